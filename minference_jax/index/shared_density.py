"""Columns and blocks at one density for all heads of a layer: a threshold on the mean weight, found for each prompt."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.index import probes, select
from minference_jax.index.per_tile import packed, unpacked
from minference_jax.index.tile_mass import estimate, last_rows, query_tiles, tile_rows
from minference_jax.index.vertical_slash import TILE_SINK_COLUMNS
from minference_jax.index.worth import Asked, Mass, within
from pallas_kernels.plan import KEY_TILE, QUERY_TILE, SparsePlan, num_query_tiles


def shared_density_index(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    density: Float[Array, " n"],
    question: Int[Array, " n"] | None,
    *,
    every: int,
    lengths: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
) -> SparsePlan:
    """Columns and blocks of every head, at one threshold for the heads of a layer.

    **Arguments:** `density`: of each head, inf for a head that does not take part. `question`: columns of each head
    that the last 64 rows ask for; None (static) where no head has any. The rest as `per_tile_index`.

    Cost: the scores of t / every rows with all keys, and eight reads of `[t / 128, s]` sums in float32 a head, which
    are held for all heads.
    """
    b, t, n, _ = q.shape
    s, kv_heads, tiles = k.shape[1], k.shape[2], num_query_tiles(t)
    valid = jnp.clip(lengths - q_offset, 0, t)
    # A head that looks at the token before needs the tile before in the first row of a query tile alone, and the last
    # row of a prompt asks for what comes next.
    rows, share = tile_rows(valid, tiles, every, ends=True)
    everywhere = jnp.broadcast_to(rows.reshape(b, 1, -1), (b, n, rows.shape[1] * rows.shape[2]))
    per_head = probes.by_kv_head({"probes": probes.gather_probes(q, everywhere)}, b, n, kv_heads)
    per_sequence = {"rows": rows, "share": share, "valid": valid}
    size = n // kv_heads * s * (rows.shape[1] * rows.shape[2] * k.dtype.itemsize + 3 * tiles * 4)
    before, diagonal = probes.map_heads(
        lambda k, heads, sequence: estimate(k, heads["probes"], sequence, q_offset, scale)[:2],
        *(k, per_head, per_sequence),
        bytes_per_kv_head=size,
    )
    mass = Mass(before, diagonal, *query_tiles(valid, q_offset, tiles))
    budgets = {"density": density} | ({} if question is None else {"question": question})
    budgets = probes.by_kv_head(budgets, b, n, kv_heads)
    asked = None
    if question is not None:
        asked = _asked(q, k, mass, budgets["question"], valid, q_offset, scale)
    found = within(mass, budgets["density"], TILE_SINK_COLUMNS, asked)
    bits = packed(*found, (q_offset + valid)[:, None, None, None], s)
    columns, blocks = (x.reshape(b, n, *x.shape[3:]) for x in bits)
    return unpacked(columns, blocks, s)


def _asked(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    mass: Mass,
    count: Int[Array, "b k g"],
    valid: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
) -> Asked:
    """The `count` keys that the last rows of each head attend to most, and of a head with any, all keys of the query
    tiles that hold these rows."""
    s, kv_heads = k.shape[1], k.shape[2]
    last = last_rows(q, kv_heads, valid, q_offset) | {"count": count}

    def best(k: Array, heads: dict[str, Array], _: Any) -> Array:
        scores, factor = probes.probe_scores(heads["last"], k, scale)
        sums = probes.lazy_weights(scores, factor, heads["last_positions"]).by_key().sum(-2)
        return select.top_k_words(jnp.where(sums > 0, sums, -jnp.inf), heads["count"])

    size = q.shape[2] // kv_heads * probes.PROBES * s * k.dtype.itemsize
    columns = select.unpack(probes.map_heads(best, k, last, valid, bytes_per_kv_head=size), s)
    columns = jnp.pad(columns, [(0, 0)] * 3 + [(0, -s % KEY_TILE)])
    first = mass.start - q_offset
    end = (first + QUERY_TILE > valid[:, None] - probes.PROBES) & (first < valid[:, None])
    blocks = end[:, None, None, :, None] & mass.past() & (count > 0)[..., None, None]
    return Asked(columns, blocks)
