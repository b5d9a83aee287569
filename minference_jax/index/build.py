"""From head patterns to one SparsePlan: every kind that occurs is estimated, and each head takes its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minference_jax.index.block_sparse import block_sparse_index
from minference_jax.index.per_tile import per_tile_index
from minference_jax.index.vertical_slash import vertical_slash_index
from minference_jax.patterns import (
    A_SHAPE,
    BLOCK_SPARSE,
    DENSE,
    PER_TILE,
    VERTICAL_SLASH,
    Pattern,
    PatternArrays,
    PlanBuilder,
    head_arrays,
)
from pallas_kernels.plan import KEY_TILE, SparsePlan, kv_limit, num_key_tiles, num_query_tiles


def make_plan(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    pattern: Pattern | Sequence[Pattern] | PatternArrays | PlanBuilder,
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
) -> SparsePlan:
    """The online index: which keys each head's queries visit.

    **Arguments:**

    - `q`: `[b, t, n, h]`, after position embedding; `k`: `[b, s, k, h]`, same dtype; n a multiple of k.
    - `pattern`: one pattern for all heads, one per head, or `PatternArrays` with leaves `[n]` (budgets may then be
      traced; which kinds occur, and the widths, are static), or a `PlanBuilder`, which then makes the plan.
    - `lengths`: int32 `[b]`, keys of each sequence (right padding), clamped to [0, s]; default all s.
    - `q_offset`: int32 scalar, position of the first query row, a multiple of 128; may be traced. In chunked prefill
      and follow-up turns each chunk is estimated from its own last rows, over the keys up to them.
    - `scale` (static): of the scores, by default 1/sqrt(h).

    **Returns:** a `SparsePlan` of static widths. A head's unused parts have count 0.

    **Raises:** ValueError for shapes that do not fit, TypeError for something that is no pattern.

    Works under jit, vmap, lax.scan over layers (with `PatternArrays`) and shard_map over heads.
    """
    _check(q, k, lengths)
    heads = head_arrays(pattern, q.shape[2])
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    limit, q_offset = kv_limit(lengths, q.shape[0], k.shape[1]), jnp.asarray(q_offset, jnp.int32)
    if isinstance(heads, PlanBuilder):
        return _built(heads, q, k, limit, q_offset, factor)
    return _plan(q, k, heads, limit, q_offset, factor)


@partial(jax.jit, static_argnames="scale")
def _built(builder: PlanBuilder, q: Array, k: Array, limit: Array, q_offset: Array, scale: float) -> SparsePlan:
    return builder.build(q, k, lengths=limit, q_offset=q_offset, scale=scale)


@partial(jax.jit, static_argnames="scale")
def _plan(q: Array, k: Array, heads: PatternArrays, limit: Array, q_offset: Array, scale: float) -> SparsePlan:
    b, _, n, _ = q.shape
    s, limits = k.shape[1], heads.limits
    columns, bands, blocks = [], [], []  # (heads that take it, positions, count), each broadcastable to [b, n, width]
    if VERTICAL_SLASH in limits.kinds:
        found = vertical_slash_index(q, k, heads, lengths=limit, q_offset=q_offset, scale=scale)
        chosen = heads.kind == VERTICAL_SLASH
        columns.append((chosen, found.columns, found.column_count))
        bands.append((chosen, found.bands, found.band_count))
    if PER_TILE in limits.kinds:
        per_tile = per_tile_index(q, k, heads, lengths=limit, q_offset=q_offset, scale=scale)
        chosen = heads.kind == PER_TILE
        columns.append((chosen, per_tile.columns, per_tile.column_count))
        blocks.append((chosen[:, None], per_tile.blocks, per_tile.block_count))
    if A_SHAPE in limits.kinds or DENSE in limits.kinds:
        # Dense is a window over everything, so that it shares a launch with other heads.
        window = jnp.where(heads.kind == DENSE, s, heads.second)
        window_tiles = num_key_tiles(s if DENSE in limits.kinds else min(s, limits.window))
        chosen = (heads.kind == A_SHAPE) | (heads.kind == DENSE)
        # The oldest key of a tile's window is q0 − window + 1.
        count = jnp.minimum((window + KEY_TILE - 2) // KEY_TILE, window_tiles)
        bands.append((chosen, _every(KEY_TILE, window_tiles, start=1), count))
        if min(s, limits.sink) > 0:
            sink = jnp.where(heads.kind == A_SHAPE, jnp.minimum(heads.first, s), 0)
            columns.append((heads.kind == A_SHAPE, _every(1, min(s, limits.sink)), sink))
    if BLOCK_SPARSE in limits.kinds:
        found = block_sparse_index(q, k, heads.first, limits.blocks, lengths=limit, q_offset=q_offset)
        blocks.append(((heads.kind == BLOCK_SPARSE)[:, None], *found))
    per_head, tiles = (b, n), (b, n, num_query_tiles(q.shape[1]))
    parts = (*_merge(columns, per_head), *_merge(bands, per_head), *_merge(blocks, tiles))
    multiple = 1 if limits.lines else KEY_TILE  # only lines are covered by tiles that start anywhere
    return SparsePlan(*parts, band_multiple=multiple, clean=True)


def _every(step: int, count: int, start: int = 0) -> Int[Array, "1 1 w"]:
    return step * jnp.arange(start, start + count, dtype=jnp.int32)[None, None]


def _merge(
    parts: list[tuple[Bool[Array, "*#lead"], Array, Array]], lead: tuple[int, ...]
) -> tuple[Int[Array, "*lead w"] | None, Int[Array, "*lead"] | None]:
    """Each head's positions from the part that it takes, at one common width."""
    if not parts:
        return None, None
    width = max(positions.shape[-1] for _, positions, _ in parts)
    merged, count = jnp.zeros((*lead, width), jnp.int32), jnp.zeros(lead, jnp.int32)
    for chosen, positions, found in parts:
        positions = jnp.pad(positions, [(0, 0)] * (positions.ndim - 1) + [(0, width - positions.shape[-1])])
        merged = jnp.where(chosen[..., None], positions, merged)
        count = jnp.where(chosen, found, count)
    return merged, count


def _check(q: Array, k: Array, lengths: Array | None) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q must be [b, t, n, h] and k [b, s, k, h], got {q.shape} and {k.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k differ in batch or head_dim: {q.shape} and {k.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, no multiple of k's {k.shape[2]}")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"q has more rows than k: {q.shape} and {k.shape}")
    if q.dtype != k.dtype:
        raise ValueError(f"q and k differ in dtype: {q.dtype} and {k.dtype}")
    if lengths is not None and lengths.shape != (q.shape[0],):
        raise ValueError(f"lengths has shape {lengths.shape}; expected ({q.shape[0]},)")
