"""A few rows times one layer of stacked weights, read where they lie.

Decoding multiplies one row a sequence with every weight: it is bound by reading them. A compiler's matrix products want
an operand of their own, so a loop over layers first copies each layer's slice, and moves three bytes for one. This
kernel takes the stack and the layer's number. The summed axis is split over thread blocks, whose parts are added up.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

BLOCKS = 528
"""Thread blocks to aim at: four for each multiprocessor of an H100 or H200."""

ROWS = 16
"""Rows of a tensor-core product, and the most that a call may have."""

INSIDE, OUT = 64, 128
"""Tile of a weight: summed and free indices."""


def stacked_matvec(
    x: Float[Array, "b i"],
    weight: Float[Array, "layers i o"],
    layer: Int[Array, ""],
    *,
    interpret: bool = False,
) -> Float[Array, "b o"]:
    """x · weight[layer] with float32 sums, in x's dtype.

    **Arguments:** `x`: `[b, i]`, at most 16 rows; `weight`: `[layers, i, o]`, both bfloat16 or float16, i a multiple of
    64 and o of 128. `layer`: int32 scalar, may be traced. `interpret`: run the kernel on a CPU.

    **Raises:** ValueError for anything else; ask `unsupported_reason` before.
    """
    reason = unsupported_reason(x, weight)
    if reason is not None:
        raise ValueError(f"stacked_matvec: {reason}")
    (b, inside), out = x.shape, weight.shape[2]
    steps = inside // INSIDE
    splits = max(1, min(steps, BLOCKS // (out // OUT)))
    parts = pl.pallas_call(
        partial(_kernel, steps=steps, splits=splits, rows=b),
        grid=(out // OUT, splits),
        out_shape=jax.ShapeDtypeStruct((splits, ROWS, out), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="stacked_matvec",
    )(layer[None], jnp.pad(x, ((0, ROWS - b), (0, 0))), weight)
    return jnp.sum(parts[:, :b], axis=0).astype(x.dtype)


def unsupported_reason(x: Float[Array, "b i"], weight: Float[Array, "layers i o"]) -> str | None:
    """Why `stacked_matvec` can't serve a call, in words; None if it can."""
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[1]:
        return f"x {x.shape} does not fit weight {weight.shape}"
    if x.dtype not in (jnp.bfloat16, jnp.float16) or weight.dtype != x.dtype:
        return f"the kernel computes in bfloat16 or float16; x is {x.dtype} and weight {weight.dtype}"
    if x.shape[0] > ROWS:
        return f"the kernel takes at most {ROWS} rows, got {x.shape[0]}"
    if weight.shape[1] % INSIDE or weight.shape[2] % OUT:
        return f"the kernel needs multiples of {INSIDE} and {OUT} numbers in a weight of shape {weight.shape[1:]}"
    return None


def _kernel(layer_ref, x_ref, weight_ref, out_ref, *, steps: int, splits: int, rows: int) -> None:
    column, split = pl.program_id(0) * OUT, pl.program_id(1)
    layer = layer_ref[0]
    share = -(-steps // splits)

    def step(index, total):
        first = index * INSIDE
        tile = weight_ref[layer, pl.ds(first, INSIDE), pl.ds(column, OUT)]
        return total + plgpu.dot(x_ref[:, pl.ds(first, INSIDE)], tile)

    total = jnp.zeros((ROWS, OUT), jnp.float32)
    total = jax.lax.fori_loop(split * share, jnp.minimum((split + 1) * share, steps), step, total)
    wanted = jnp.arange(ROWS, dtype=jnp.int32)[:, None] < rows
    plgpu.store(out_ref.at[split, :, pl.ds(column, OUT)], total, mask=wanted)
