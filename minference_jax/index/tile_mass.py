"""Attention mass by query tile and key, from probe rows every few rows: what the per-tile rules choose from."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.index import probes
from minference_jax.index.weights import lazy_weights
from minference_jax.index.worth import Mass
from pallas_kernels.plan import KEY_TILE, QUERY_TILE


def tile_rows(
    valid: Int[Array, " b"], tiles: int, every: int, *, ends: bool
) -> tuple[Int[Array, "b i p"], Float[Array, "b i p"]]:
    """The probe rows of each query tile and how many rows each stands for: 0 for one past the valid rows. Each is in
    the middle of its `every` rows; with `ends` the first of them, but the last probe of a tile, which may be its only
    one, is its last valid row.

    In the last tile of a sequence those that are valid share its rows, or if none is, its last row stands for all.
    """
    start = QUERY_TILE * jnp.arange(tiles, dtype=jnp.int32)[:, None]
    first = 0 if ends else every // 2
    rows = start + every * jnp.arange(QUERY_TILE // every, dtype=jnp.int32) + first
    valid = valid[:, None, None]
    end = jnp.minimum(start + QUERY_TILE, valid)  # [b, i, 1]
    inside = jnp.clip(end - start, 0)
    seen = (rows < valid) | ((rows == rows[:, :1]) & (inside > 0))
    number = jnp.maximum((inside - first + every - 1) // every, 1)  # of those seen
    share = jnp.where(seen, inside, 0) / number
    if ends:
        rows = jnp.where(rows + every >= end, end - 1, rows)
    return jnp.clip(jnp.minimum(rows, valid - 1), 0), share.astype(jnp.float32)


def estimate(
    k: Float[Array, "b s k h"],
    rows: Float[Array, "b k g p h"],
    sequence: dict[str, Array],
    q_offset: Int[Array, ""],
    scale: float,
) -> Mass:
    """The attention mass of each query tile on each key, from the probe rows of some KV heads.

    **Arguments:** `rows`: queries of the probes, all query tiles in a row; `sequence`: of each sequence, `rows` and
    `share` as `tile_rows` gives them, and `valid`, its number of valid query rows.
    """
    b, tiles, per_tile = sequence["share"].shape
    scores, factor = probes.probe_scores(rows, k, scale)
    positions = jnp.where(sequence["share"] > 0, sequence["rows"] + q_offset, -1).reshape(b, 1, 1, -1)
    importance = jnp.broadcast_to(sequence["share"].reshape(b, 1, 1, -1), scores.shape[:-1])
    weights = lazy_weights(scores, factor, jnp.broadcast_to(positions, scores.shape[:-1]), importance).by_key()
    held = weights.reshape(*scores.shape[:3], tiles, per_tile, -1).sum(-2)
    inside, start = query_tiles(sequence["valid"], q_offset, tiles)
    before = jnp.where(jnp.arange(held.shape[-1], dtype=jnp.int32) < start[:, None], held, 0)
    diagonal = inside.sum(-1) - before.sum((-1, -2))
    before = jnp.pad(before, [(0, 0)] * 4 + [(0, -held.shape[-1] % KEY_TILE)])
    return Mass(before.reshape(*before.shape[:-1], -1, KEY_TILE), diagonal, inside, start)


def query_tiles(
    valid: Int[Array, " b"], q_offset: Int[Array, ""], tiles: int
) -> tuple[Float[Array, "b 1 1 i"], Int[Array, " i"]]:
    """Valid rows of each query tile, and the position of its first row."""
    first = QUERY_TILE * jnp.arange(tiles, dtype=jnp.int32)
    inside = jnp.clip(valid[:, None] - first, 0, QUERY_TILE).astype(jnp.float32)
    return inside[:, None, None], q_offset + first


def last_rows(
    q: Float[Array, "b t n h"], kv_heads: int, valid: Int[Array, " b"], q_offset: Int[Array, ""]
) -> dict[str, Array]:
    """The last 64 valid rows, which the original looks at, `[b, k, g, 64, h]`, and their positions."""
    b, _, n, _ = q.shape
    rows = probes.probe_rows(valid, jnp.zeros((n,), bool))
    last = {"last": probes.gather_probes(q, rows), "last_positions": jnp.where(rows >= 0, rows + q_offset, -1)}
    return probes.by_kv_head(last, b, n, kv_heads)
