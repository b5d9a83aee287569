"""FP8 products put in their place in a longer array: scaled, and rotated by RoPE on the way, in place.

XLA's own kernel takes 4 elements a thread and has 38 instructions for each on an H200, most of them for addresses of 64
bits and single conversions: it ran at half the rate of memory. Here a thread has 16 or 8, 16 bytes at a time: 12 and 8.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels.rows.instructions import as_bfloat16, as_float32

EACH = 8
"""Elements of a row that a thread has side by side: 16 bytes."""

MOST = 2048
"""Elements of a thread block, at most; of each half, where halves are rotated."""


def placed_rows(
    into: BFloat16[Array, "b t n h"],
    start: Int32[Array, ""],
    y: BFloat16[Array, "rows f"],
    row_scale: Float32[Array, " rows"],
    channel_scale: Float32[Array, "n h"],
    turn: tuple[Float32[Array, "#b c r"], Float32[Array, "#b c r"]] | None,
    *,
    interpret: bool = False,
) -> BFloat16[Array, "b t n h"]:
    """`into` with c rows of each sequence replaced by an FP8 product: with its scales, after RoPE.

    Numbers are scaled in float32 and rounded to bfloat16, then rotated in float32 and rounded again. Dimensions j and
    j + h/2 of a head are a pair.

    **Arguments:**

    - `into`: bfloat16 `[b, t, n, h]`, h a power of two from 16 on; given up for the result.
    - `start`: int32, the first row that is replaced, clipped to 0 … t - c.
    - `y`: bfloat16 `[rows, f]`, rows = b · c and f = n · h: a product whose scales are not applied yet.
    - `row_scale`, `channel_scale`: float32 `[rows]` and `[n, h]`.
    - `turn`: cos and sin of each row's angles, float32 `[b or 1, c, h / 2]`; None to rotate nothing.
    - `interpret` (static): run the kernel on a CPU, for tests.

    **Returns:** `[b, t, n, h]`.

    **Raises:** ValueError for what does not fit, with the reason that `unsupported_reason` gives.
    """
    reason = unsupported_reason(y, into)
    if reason is not None:
        raise ValueError(f"placed_rows: {reason}")
    (b, t, n, h), rows = into.shape, y.shape[0]
    each = rows // b
    halves = [pl.ds(0, h)] if turn is None else [pl.ds(0, h // 2), pl.ds(h // 2, h // 2)]
    heads = min(n & -n, max(1, MOST * len(halves) // h))
    threads = heads * h // len(halves) // EACH

    def kernel(y_ref: Any, row_ref: Any, channel_ref: Any, *refs: Any) -> None:
        *turn_refs, start_ref, _, out_ref = refs
        row, own = pl.program_id(0), pl.ds(pl.program_id(1) * heads, heads)
        sequence, place = row // each, row % each
        at = (sequence, start_ref[0] + place, own)
        read = [y_ref.at[row, own, half] for half in halves]
        read = [plgpu.load(x, eviction_policy="evict_first") for x in read]
        values = []
        for x, half in zip(read, halves, strict=True):
            x = as_float32(x, interpret) * row_ref[row] * channel_ref[own, half]
            values.append(as_bfloat16(x, interpret))
        if turn is not None:
            a, b = (as_float32(x, interpret) for x in values)
            pairs = jax.lax.broadcasted_iota(jnp.int32, a.shape, 1)
            cos, sin = (ref[sequence if ref.shape[0] > 1 else 0, place, pairs] for ref in turn_refs)
            values = [a * cos - b * sin, b * cos + a * sin]
            values = [as_bfloat16(x, interpret) for x in values]
        for value, half in zip(values, halves, strict=True):
            out_ref[*at, half] = value

    inputs = y.reshape(rows, n, h), row_scale, channel_scale, *(turn or ()), jnp.clip(start, 0, t - each)[None], into
    return pl.pallas_call(
        kernel,
        grid=(rows, n // heads),
        out_shape=jax.ShapeDtypeStruct(into.shape, into.dtype),
        input_output_aliases={len(inputs) - 1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=min(8, max(1, threads // 32)), num_stages=1),
        interpret=interpret,
        name="placed_rows",
    )(*inputs)


def unsupported_reason(y: Any, into: Any) -> str | None:
    """Why the kernel can't put such rows into such an array, in words; None if it can."""
    if y.dtype != jnp.bfloat16 or into.dtype != jnp.bfloat16:
        return f"the kernel reads and writes bfloat16; the rows are {y.dtype}, the array {into.dtype}"
    (b, t, n, h), (rows, f) = into.shape, y.shape
    if h < 16 or h & (h - 1):
        return f"head_dim must be a power of two from 16 on, got {h}"
    if y.size == 0:
        return f"there is nothing in rows of shape {y.shape}"
    if f != n * h or rows % b or rows > b * t:
        return f"rows of shape {y.shape} do not fit an array of shape {into.shape}"
    if y.size >= 2**30:
        return f"the kernel addresses less than {2**30:,} elements; there are {y.size:,}"
    return None
