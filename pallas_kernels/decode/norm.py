"""A row a sequence: what a block adds to the residual stream, and the norm of the sum, in one launch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

WIDEST = 16_384
"""Elements of the longest row: 32 of each thread."""


def add_and_norm(
    x: Float[Array, "b d"],
    added: Float[Array, "b d"],
    weight: Float[Array, "layers d"],
    layer: Int[Array, ""],
    *,
    eps: float,
    offset: float | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
    """x + added, and RMSNorm of that: x / √(mean(x²) + eps), rounded to x's dtype, times the weight of a layer.

    **Arguments:**

    - `x`: `[b, d]`, bfloat16 or float16, d at most 16,384. `added`: in any floating dtype, rounded to x's first.
    - `weight`: in x's dtype, of all layers. `layer`: int32 scalar, one of them.
    - `eps`, `offset` (static): with an offset, the weight is offset + weight in float32, and rounding comes after it.
    - `interpret` (static): run the kernel on a CPU, for tests.

    **Returns:** both `[b, d]` in x's dtype. The sum of squares is float32.

    **Raises:** ValueError for what does not fit, with the reason that `unsupported_reason` gives.
    """
    reason = unsupported_reason(x, added, weight)
    if reason is not None:
        raise ValueError(f"add_and_norm: {reason}")
    (b, width), shape = x.shape, jax.ShapeDtypeStruct(x.shape, x.dtype)
    warps = min(16, pl.next_power_of_2(max(1, width // 512)))  # the compiler ends the process on any other number
    total, normed = pl.pallas_call(
        partial(_kernel, eps=eps, offset=offset),
        grid=(b,),
        out_shape=[shape, shape],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="add_and_norm",
    )(layer[None], x, added, weight)
    return total, normed


def unsupported_reason(
    x: Float[Array, "b d"], added: Float[Array, "b d"], weight: Float[Array, "layers d"]
) -> str | None:
    """Why the kernel can't serve a call, in words; None if it can."""
    if added.shape != x.shape or x.shape[-1:] != weight.shape[1:]:
        return f"x {x.shape}, added {added.shape} and weight {weight.shape} do not fit each other"
    if x.dtype not in (jnp.bfloat16, jnp.float16) or weight.dtype != x.dtype:
        return f"the kernel takes rows and weights in bfloat16 or float16; they are {x.dtype} and {weight.dtype}"
    if x.size == 0:
        return f"there is nothing in rows of shape {x.shape}"
    if x.shape[-1] > WIDEST:
        return f"the kernel holds rows of at most {WIDEST:,} elements; these have {x.shape[-1]:,}"
    return None


def _kernel(layer_ref, x_ref, added_ref, weight_ref, total_ref, normed_ref, *, eps: float, offset: float | None):
    row, layer, width, dtype = pl.program_id(0), layer_ref[0], x_ref.shape[1], x_ref.dtype
    sizes = [1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]
    pieces = [pl.ds(sum(sizes[:n]), size) for n, size in enumerate(sizes)]
    weights = [weight_ref[layer, piece] for piece in pieces]
    total = [x_ref[row, piece] + added_ref[row, piece].astype(dtype) for piece in pieces]
    squares = sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in total)
    factor = jax.lax.rsqrt(squares / width + eps)
    for piece, y, weight in zip(pieces, total, weights, strict=True):
        total_ref[row, piece] = y
        y = y.astype(jnp.float32) * factor
        if offset is None:
            normed_ref[row, piece] = weight * y.astype(dtype)
        else:
            normed_ref[row, piece] = (y * (offset + weight.astype(jnp.float32))).astype(dtype)
