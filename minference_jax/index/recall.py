"""Recall: the share of dense attention's softmax mass that lies inside a plan."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minference_jax.index import probes
from minference_jax.index.weights import probe_weights
from pallas_kernels.checks import check_lengths, check_q_offset, check_qkv, check_scale
from pallas_kernels.plan import QUERY_TILE, SparsePlan, kv_limit, num_query_tiles, visited_keys
from pallas_kernels.spread import KV_AXES, PER_HEAD, PER_SEQUENCE, Q_AXES, WHOLE, by_device
from pallas_kernels.tracing import under_own_settings

CELLS = 1 << 23
"""How many (probe, key) pairs `estimated_recall` looks up in a plan at once, at some bytes each: few and large steps
where prompts are short."""

AXES = (Q_AXES, KV_AXES, PER_HEAD, PER_SEQUENCE, WHOLE)
"""Of the arguments of both functions; see `pallas_kernels.spread`."""


@under_own_settings
def recall(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    plan: SparsePlan,
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
) -> Float[Array, "b n"]:
    """Mean over a sequence's valid rows of the dense softmax mass on the keys that `plan` visits.

    **Arguments:** as `pallas_kernels.sparse_attention`. **Returns:** float32 `[b, n]` in [0, 1]; 1 for a sequence
    without a valid row.

    Exact, and as expensive as dense attention: one query tile of one KV head's group at a time, so memory is
    g · 128 · s floats.
    """
    check_qkv(q, k, k)
    plan.validate(q.shape[0], q.shape[2], q.shape[1])
    limit = kv_limit(check_lengths(lengths, q.shape[0], k.shape[1]), q.shape[0], k.shape[1])
    arrays = (q, k, plan, limit, check_q_offset(q_offset, q.shape[1], k.shape[1]))
    return by_device(_recall, arrays, AXES, PER_HEAD, factor=check_scale(scale, q))


@partial(jax.jit, static_argnames="factor")
def _recall(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    plan: SparsePlan,
    limit: Int[Array, " b"],
    q_offset: Int[Array, ""],
    factor: float,
) -> Float[Array, "b n"]:
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    count = num_query_tiles(t)
    tiles_of_q = jnp.pad(q, ((0, 0), (0, count * QUERY_TILE - t), (0, 0), (0, 0)))
    tiles_of_q = tiles_of_q.reshape(b, count, QUERY_TILE, kv_heads, n // kv_heads, h)

    def one(index: Int[Array, ""]) -> Float[Array, " g"]:
        row, head = index // kv_heads, index % kv_heads
        keys = jax.lax.dynamic_index_in_dim(k, row, keepdims=False)
        keys = jax.lax.dynamic_index_in_dim(keys, head, axis=1, keepdims=False)
        group = _group(plan, row, head, n // kv_heads)
        columns = column_flags(group, keys.shape[0])

        def tile(i: Int[Array, ""]) -> Float[Array, " g"]:
            queries = jax.lax.dynamic_index_in_dim(tiles_of_q, row, keepdims=False)[i][:, head]  # [128, g, h]
            positions = q_offset + i * QUERY_TILE + jnp.arange(QUERY_TILE, dtype=jnp.int32)
            ends = jnp.where((positions < limit[row]) & (positions < q_offset + t), positions, -1)
            exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
            scores = jnp.einsum("pgh,sh->gps", queries, keys, precision=exact, preferred_element_type=jnp.float32)
            weights = probe_weights(scores, factor, jnp.broadcast_to(ends, scores.shape[:2]))
            inside = visited_keys(group, i, keys.shape[0], q_offset, (1, n // kv_heads))[0] | columns
            return jnp.sum(jnp.where(inside[:, None], weights, 0), axis=(1, 2))

        return jax.lax.map(tile, jnp.arange(count, dtype=jnp.int32)).sum(0)

    held = jax.lax.map(one, jnp.arange(b * kv_heads, dtype=jnp.int32)).reshape(b, n)
    valid = jnp.clip(limit - q_offset, 0, t)[:, None].astype(jnp.float32)
    return jnp.where(valid > 0, jnp.minimum(held / jnp.maximum(valid, 1), 1), 1)


def estimated_recall(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    plan: SparsePlan,
    lengths: Int[Array, " b"],
    q_offset: Int[Array, ""],
    *,
    scale: float,
) -> Float[Array, "b n"]:
    """As `recall`, from 64 probe rows (the last 16 and 48 spread over the rows): as cheap as the index itself.

    The plan was often made from the same rows, so this errs on the high side.
    """
    b, t, n, _ = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    rows = probes.probe_rows(jnp.clip(lengths - q_offset, 0, t), jnp.ones((n,), bool))
    positions = jnp.where(rows >= 0, rows + q_offset, -1)
    per_head = {
        "probes": probes.gather_probes(q, rows),
        "positions": positions,
        "columns": column_flags(plan, s, (b, n)),
        "plan": plan,
    }
    per_head = jax.tree.map(lambda x: x.reshape(b, kv_heads, n // kv_heads, *x.shape[2:]), per_head)
    # The probes are the same rows for all heads of a sequence, so tiles are looked up once per probe.
    query_tiles = jnp.clip(rows[:, 0], 0, t - 1) // QUERY_TILE

    def some_heads(k: Array, per_head: dict[str, Any], query_tiles: Int[Array, "b p"]) -> Array:
        scores, factor = probes.probe_scores(per_head["probes"], k, scale)
        weights = probe_weights(scores, factor, per_head["positions"])
        heads = per_head["columns"].shape[1:3]

        def seen_by(sequence: tuple[SparsePlan, Array]) -> Bool[Array, "p n s"]:
            own = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), sequence[0])
            shape = (1, heads[0] * heads[1])
            at_once = min(probes.PROBES, max(1, CELLS // (shape[1] * s)))
            return jax.lax.map(lambda i: visited_keys(own, i, s, q_offset, shape)[0], sequence[1], batch_size=at_once)

        at_once = min(query_tiles.shape[0], max(1, CELLS // (heads[0] * heads[1] * s * probes.PROBES)))
        seen = jax.lax.map(seen_by, (per_head["plan"], query_tiles), batch_size=at_once).swapaxes(1, 2)
        inside = seen.reshape(scores.shape) | per_head["columns"][..., None, :]
        held = jnp.sum(jnp.where(inside, weights, 0), axis=(-1, -2))
        count = jnp.sum(per_head["positions"] >= 0, axis=-1).astype(jnp.float32)
        return jnp.where(count > 0, jnp.minimum(held / jnp.maximum(count, 1), 1), 1)

    size = n // kv_heads * probes.PROBES * s * k.dtype.itemsize
    return probes.map_heads(some_heads, k, per_head, query_tiles, bytes_per_kv_head=size).reshape(b, n)


def column_flags(plan: SparsePlan, s: int, shape: tuple[int, int] | None = None) -> Array:
    """True at the plan's columns: bool `[b, n, s]`, or without the batch axis where `shape` is None (b = 1)."""
    if plan.columns is None or plan.column_count is None:
        return jnp.zeros((1, s) if shape is None else (*shape, s), bool)

    def flags(columns: Array, count: Array) -> Array:
        keep = (jnp.arange(columns.shape[0]) < count) & (columns >= 0)
        return jnp.zeros((s,), bool).at[jnp.where(keep, columns, s)].set(True, mode="drop")

    found = jax.vmap(jax.vmap(flags))(plan.columns, plan.column_count)
    return found[0] if shape is None else found


def _group(plan: SparsePlan, row: Int[Array, ""], head: Int[Array, ""], size: int) -> SparsePlan:
    def part(x: Array) -> Array:
        x = jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0)
        return jax.lax.dynamic_slice_in_dim(x, head * size, size, axis=1)

    return jax.tree.map(part, plan)
