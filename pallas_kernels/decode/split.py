"""The kernels of decode attention: shares of the keys, one thread block each, and the merge of what they found."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

BLOCKS = {1: 528, 2: 264}
"""Thread blocks to aim at, by the bytes of a cached number: four or two for each multiprocessor of an H100 or H200, of
which two run at a time. For 131,328 keys of 8 heads in bfloat16 two took 124.9 µs on an H200 and four 139.8, one 125.0
with twice the keys at a time, eight 131.1 (commit fdde152); caches of one byte were not measured again."""

MIN_ROWS = 16
"""Rows of the smallest tensor-core product; groups of fewer query heads are padded to it."""

UNITS = 2.0**14
"""A weight of one, in float16 products with quantized values: weights down to 4e-12 of it still count."""

COLUMNS = 32
"""Columns of a head that a thread block merges: 128 bytes of each share."""

LOWEST = float(jnp.finfo(jnp.float32).min)
TINY = float(jnp.finfo(jnp.float32).tiny)


def tile_of(k: Array) -> int:
    """Keys that a thread block loads at a time: 16 KB for head_dim 128."""
    return 128 if k.dtype.itemsize == 1 else 64


def split_attention(
    q: Float[Array, "b n h"],
    k: Array,
    v: Array,
    k_scale: Float[Array, "layers b s k"] | None,
    v_scale: Float[Array, "layers b s k"] | None,
    layer: Int[Array, ""],
    lengths: Int[Array, " b"],
    *,
    scale: float,
    interpret: bool,
    warps: int = 4,
    stages: int = 3,
) -> tuple[Float[Array, "b n h"], Float[Array, "b n"]]:
    """`decode_attention` and its log-sum-exp, in two launches. The layer and the lengths are clamped by the kernel."""
    b, n, h = q.shape
    s, kv_heads = k.shape[2:4]
    group = n // kv_heads
    rows = max(MIN_ROWS, pl.next_power_of_2(group))
    scales = [] if k_scale is None else [k_scale, v_scale]
    splits = max(1, min(BLOCKS[k.dtype.itemsize] // (b * kv_heads), s // tile_of(k)))
    out, top, total = pl.pallas_call(
        partial(_kernel, tile=tile_of(k), rows=rows, scale=scale, quantized=bool(scales)),
        grid=(kv_heads, splits, b),
        out_shape=[
            jax.ShapeDtypeStruct((b, kv_heads, splits, rows, h), jnp.float32),
            jax.ShapeDtypeStruct((b, kv_heads, splits, rows), jnp.float32),
            jax.ShapeDtypeStruct((b, kv_heads, splits, rows), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="decode_attention",
    )(layer[None], lengths, q.reshape(b, kv_heads, group, h), k, v, *scales)
    columns = min(h, COLUMNS)
    merged, lse = pl.pallas_call(
        partial(_merge, group=group, columns=columns),
        grid=(h // columns, n, b),
        out_shape=[jax.ShapeDtypeStruct((b, n, h), q.dtype), jax.ShapeDtypeStruct((b, n), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="decode_merge",
    )(out, top, total)
    return merged, lse


def _kernel(
    layer_ref, lengths_ref, q_ref, k_ref, v_ref, *refs, tile: int, rows: int, scale: float, quantized: bool
) -> None:
    scale_refs, (out_ref, top_ref, total_ref) = refs[:-3], refs[-3:]
    head, split, batch = (pl.program_id(axis) for axis in range(3))
    group, (layers, s) = q_ref.shape[2], k_ref.shape[:3:2]
    layer, length = jnp.clip(layer_ref[0], 0, layers - 1), jnp.clip(lengths_ref[batch], 0, s)
    tiles = pl.cdiv(length, tile)
    share = pl.cdiv(tiles, pl.num_programs(1))
    each = jnp.arange(rows, dtype=jnp.int32)
    q = q_ref[batch, head, jnp.minimum(each, group - 1)]  # rows past the group are its last one again
    factor = scale
    if quantized:
        # GPUs turn e4m3 into float16 in one instruction, into bfloat16 in many. Queries are brought into its range.
        q = q.astype(jnp.float32)
        size = jnp.max(jnp.abs(q), axis=1)
        q, factor = (q / jnp.maximum(size, TINY)[:, None]).astype(jnp.float16), (scale * size)[:, None]

    def step(index, state):
        out, top, total = state
        # The last tile of a cache that is no multiple of it begins early; rows seen before are masked.
        intended = index * tile
        first = jnp.minimum(intended, s - tile)
        position = first + jnp.arange(tile, dtype=jnp.int32)
        seen = ((position >= intended) & (position < length))[None]
        keys = k_ref[layer, batch, pl.ds(first, tile), head].astype(q.dtype)
        scores = plgpu.dot(q, keys.T) * factor
        if quantized:
            scores *= scale_refs[0][layer, batch, pl.ds(first, tile), head].astype(jnp.float32)[None]
        scores = jnp.where(seen, scores, LOWEST)
        higher = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.where(seen, jnp.exp(scores - higher[:, None]), 0)
        keep = jnp.exp(top - higher)
        total = total * keep + weights.sum(axis=1)
        values = v_ref[layer, batch, pl.ds(first, tile), head].astype(q.dtype)
        if not quantized:
            return out * keep[:, None] + plgpu.dot(weights.astype(q.dtype), values), higher, total
        # Weights times factors, in units that leave float16 its full range below the largest.
        sizes = scale_refs[1][layer, batch, pl.ds(first, tile), head].astype(jnp.float32)[None]
        sizes = jnp.where(seen, sizes, 0)
        unit = jnp.maximum(jnp.max(sizes) / UNITS, TINY)
        part = plgpu.dot((weights * (sizes / unit)).astype(q.dtype), values)
        return out * keep[:, None] + part * unit, higher, total

    state = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((rows,), LOWEST, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    out, top, total = jax.lax.fori_loop(split * share, jnp.minimum((split + 1) * share, tiles), step, state)
    wanted = each < group
    plgpu.store(out_ref.at[batch, head, split], out, mask=jnp.broadcast_to(wanted[:, None], out.shape))
    plgpu.store(top_ref.at[batch, head, split], top, mask=wanted)
    plgpu.store(total_ref.at[batch, head, split], total, mask=wanted)


def _merge(out_ref, top_ref, total_ref, merged_ref, lse_ref, *, group: int, columns: int) -> None:
    """Some columns of one query head, from all its shares by their log-sum-exp."""
    piece, head, batch = (pl.program_id(axis) for axis in range(3))
    splits = out_ref.shape[2]
    each = jnp.arange(pl.next_power_of_2(splits), dtype=jnp.int32)
    at = batch, head // group, jnp.minimum(each, splits - 1), head % group
    top, total = top_ref[at], jnp.where(each < splits, total_ref[at], 0)
    best = jnp.max(top)
    weight = jnp.where(total > 0, jnp.exp(top - best), 0)
    whole = jnp.sum(total * weight)
    parts = out_ref[(*at, pl.ds(piece * columns, columns))]
    weight = jnp.where(each < splits, weight, 0)
    merged = jnp.sum(parts * weight[:, None], axis=0) / jnp.maximum(whole, TINY)
    merged_ref[batch, head, pl.ds(piece * columns, columns)] = merged.astype(merged_ref.dtype)
    lse_ref[batch, head] = best + jnp.log(whole)
