"""Arithmetic inside the row kernels, in as few instructions as a GPU has for it.

The compiler's own forms have more: three instructions take two bfloat16 numbers apart where two do, and a dozen compute
1 / (1 + 2^y) where three do, for numbers below 2⁻¹²⁶ and above 2¹²⁶. Interpreted kernels compute the same in jnp.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, BFloat16, Float, Float32


def as_float32(x: Float[Array, "*size"], interpret: bool) -> Float32[Array, "*size"]:
    """bfloat16 numbers as float32, of which they are the upper halves; float32 ones as they are."""
    if interpret or x.dtype == jnp.float32:
        return x.astype(jnp.float32)
    return _issued("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], jnp.float32, pack=2)


def as_bfloat16(x: Float32[Array, "*size"], interpret: bool) -> BFloat16[Array, "*size"]:
    """float32 numbers rounded to bfloat16, to the nearest."""
    if interpret:
        return x.astype(jnp.bfloat16)
    return _issued("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], jnp.bfloat16, pack=2)


def multiply_add(
    x: Float32[Array, " size"], y: Float32[Array, " size"], z: Float32[Array, " size"], interpret: bool
) -> Float32[Array, " size"]:
    """x · y + z, rounded once."""
    if interpret:
        return x * y + z
    return _issued("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], jnp.float32)


def one_over_one_plus_power(y: Float32[Array, " size"], interpret: bool) -> Float32[Array, " size"]:
    """1 / (1 + 2^y); results below 2⁻¹²⁶ are zero.

    Power and reciprocal are PTX's approximate ones: e4m3 numbers made of them were the nearest to the exact ones, to
    four digits of half a step (an H200, commit 3eeeaa1).
    """
    if interpret:
        return 1 / (1 + jnp.exp2(y))
    power = "ex2.approx.ftz.f32 x, $1; add.f32 x, x, 0f3F800000; rcp.approx.ftz.f32 $0, x;"
    return _issued("{ .reg .f32 x; " + power + " }", "=f,f", [y], jnp.float32)


def _issued(instructions: str, constraints: str, arrays: list[Array], dtype: Any, pack: int = 1) -> Array:
    (result,) = plgpu.elementwise_inline_asm(
        instructions,
        args=arrays,
        constraints=constraints,
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arrays[0].shape, dtype)],
    )
    return result
