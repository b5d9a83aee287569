"""Powers of two, some of them on the units that multiply and add.

A Hopper multiprocessor computes 16 exponentials a clock in its special function units. At head_dim 64 that takes as
long as the matrix products. A polynomial of degree 3 is as exact as 16-bit probabilities need, and runs beside them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxtyping import Array, Float

_TILE = 8  # columns that one thread's pair of neighbouring registers belongs to
_SMALLEST = -126.0  # 2**-126 is the smallest normal number; everything below it counts as that
_ROUND = 1.5 * 2**23  # adding this to a small number leaves it rounded in the lowest bits
_FACTORS = (
    0.9999280571937561,
    0.6932609677314758,
    0.2426111251115799,
    0.0551716685295105,
)  # of 2**f, |f| <= 1/2; largest relative error 1e-4


def exp2(x: Float[Array, "m s"], polynomial_tiles: int, *, emulate: bool) -> Float[Array, "m s"]:
    """2**x for x <= 0, in `polynomial_tiles` of every 16 tiles of 8 columns as a polynomial."""
    tiles = x.shape[1] // _TILE
    count = polynomial_tiles * tiles // 16
    if not count:
        return jnp.exp2(x)
    if emulate:
        tile = lax.div(lax.broadcasted_iota(jnp.int32, x.shape, 1), jnp.int32(_TILE))
        return jnp.where(lax.rem(tile * count, jnp.int32(tiles)) < count, _polynomial(x), jnp.exp2(x))
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout))
    def mixed(_, x):
        result = x.copy()
        for tile in range(tiles):
            columns = slice(tile * _TILE, (tile + 1) * _TILE)
            part = x[:, columns]
            result[:, columns] = _polynomial_registers(part) if tile * count % tiles < count else part.exp2(approx=True)
        return result

    return mixed(x)  # pyright: ignore[reportCallIssue]


def _polynomial_registers(x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    int32, float32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    x = x.max(_SMALLEST)
    rounded = x + _ROUND
    rest = x - (rounded - _ROUND)
    total = rest * _FACTORS[3] + _FACTORS[2]
    for factor in _FACTORS[1::-1]:
        total = total * rest + factor
    # The whole part goes into the exponent.
    bits = total.bitcast(int32, output_is_signed=True) + (rounded.bitcast(int32, output_is_signed=True) << 23)
    return bits.bitcast(float32)


def _polynomial(x: Float[Array, "m s"]) -> Float[Array, "m s"]:
    """The same in jnp, for the interpreter."""
    x = jnp.maximum(x, _SMALLEST)
    whole = jnp.round(x)
    rest = x - whole
    total = rest * _FACTORS[3] + _FACTORS[2]
    for factor in _FACTORS[1::-1]:
        total = total * rest + factor
    return total * jnp.exp2(whole)
