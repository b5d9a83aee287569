"""FP8 products put in their place in a longer array: scaled, and rotated by RoPE on the way, in place.

XLA's own kernel takes 4 elements a thread and has 38 instructions for each on an H200, most of them for addresses of 64
bits and single conversions: it ran at half the rate of memory. Here a thread has 16 or 8, 16 bytes at a time: 12 and 8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, BFloat16, Float32

from pallas_kernels.rows.instructions import as_bfloat16, as_float32

EACH = 8
"""Elements of a row that a thread has side by side: 16 bytes."""

MOST = 2048
"""Elements of a thread block, at most; of each half, where halves are rotated."""


class Place(NamedTuple):
    """Where rows go in an array `[B, T, N, h]`: the first sequence, row and head; and the first of their own heads that
    goes there. Integers, or int32 scalars."""

    sequence: Any = 0
    row: Any = 0
    head: Any = 0
    first: Any = 0


def placed_rows(
    into: BFloat16[Array, "B T N h"],
    at: Place,
    y: BFloat16[Array, "b c f"],
    row_scale: Float32[Array, "b c"],
    channel_scale: Float32[Array, "n h"],
    turn: tuple[Float32[Array, "#b c r"], Float32[Array, "#b c r"]] | None,
    *,
    heads: int | None = None,
    interpret: bool = False,
) -> BFloat16[Array, "B T N h"]:
    """`into` with some heads of c rows of b sequences replaced by an FP8 product: with its scales, after RoPE.

    Numbers are scaled in float32 and rounded to bfloat16, then rotated in float32 and rounded again. Dimensions j and
    j + h/2 of a head are a pair.

    **Arguments:**

    - `into`: bfloat16 `[B, T, N, h]`, h a power of two from 16 on; given up for the result.
    - `at`: where the rows go, clipped so that all of them fit.
    - `y`: bfloat16 `[b, c, f]`, f = n · h: a product whose scales are not applied yet.
    - `row_scale`, `channel_scale`: float32 `[b, c]` and `[n, h]`.
    - `turn`: cos and sin of each row's angles, float32 `[b or 1, c, h / 2]`; None to rotate nothing.
    - `heads` (static): how many of the n heads, from `at.first` on; None for all.
    - `interpret` (static): run the kernel on a CPU, for tests.

    **Returns:** `[B, T, N, h]`.

    **Raises:** ValueError for what does not fit, with the reason that `unsupported_reason` gives.
    """
    reason = unsupported_reason(y, into, heads)
    if reason is not None:
        raise ValueError(f"placed_rows: {reason}")
    (sequences, t, wide, h), (b, c, _), n = into.shape, y.shape, channel_scale.shape[0]
    heads = n if heads is None else heads
    halves = [pl.ds(0, h)] if turn is None else [pl.ds(0, h // 2), pl.ds(h // 2, h // 2)]
    block = min(heads & -heads, max(1, MOST * len(halves) // h))
    threads = block * h // len(halves) // EACH

    def kernel(y_ref: Any, row_ref: Any, channel_ref: Any, *refs: Any) -> None:
        *turn_refs, at_ref, _, out_ref = refs
        row, head = pl.program_id(0), pl.program_id(1) * block
        sequence, place = row // c, row % c
        target = pl.ds((sequence * t + place) * wide + at_ref[0] + head, block)
        own = pl.ds(head if heads == n else at_ref[1] + head, block)
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
            out_ref[target, half] = value

    most = Place(sequences - b, t - c, wide - heads, n - heads)
    sequence, row, head, first = (jnp.clip(jnp.int32(x), 0, end) for x, end in zip(at, most, strict=True))
    where = jnp.stack([(sequence * t + row) * wide + head, first])  # one number for the address: a thread adds it once
    rows = y.reshape(b * c, n, h), row_scale.reshape(-1), channel_scale
    inputs = *rows, *(turn or ()), where, into.reshape(-1, h)
    placed = pl.pallas_call(
        kernel,
        grid=(b * c, heads // block),
        out_shape=jax.ShapeDtypeStruct(inputs[-1].shape, into.dtype),
        input_output_aliases={len(inputs) - 1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=min(8, max(1, threads // 32)), num_stages=1),
        interpret=interpret,
        name="placed_rows",
    )(*inputs)
    return placed.reshape(into.shape)


def unsupported_reason(y: Any, into: Any, heads: int | None = None) -> str | None:
    """Why the kernel can't put so many heads of such rows into such an array, in words; None if it can."""
    if y.dtype != jnp.bfloat16 or into.dtype != jnp.bfloat16:
        return f"the kernel reads and writes bfloat16; the rows are {y.dtype}, the array {into.dtype}"
    (sequences, t, wide, h), (b, c, f) = into.shape, y.shape
    if h < 16 or h & (h - 1):
        return f"head_dim must be a power of two from 16 on, got {h}"
    if y.size == 0:
        return f"there is nothing in rows of shape {y.shape}"
    n = f // h
    count = n if heads is None else heads
    if f % h or not 0 < count <= min(n, wide) or b > sequences or c > t:
        return f"{count} heads of rows of shape {y.shape} do not fit an array of shape {into.shape}"
    if y.size >= 2**30:
        return f"the kernel addresses less than {2**30:,} elements; there are {y.size:,}"
    if into.size // h >= 2**31:
        return f"the kernel addresses less than {2**31:,} heads of rows; there are {into.size // h:,}"
    return None
