"""The block-sparse index: for each tile of 128 queries, the key tiles whose mean key best matches its mean query.

Source: MInference (arXiv 2407.02490) §3.2, Algorithm 3. Unlike its released code, padding does not enter the means,
the diagonal and the first tile are always taken, and the budget is what the caller says.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.index import select
from pallas_kernels.plan import KEY_TILE, QUERY_TILE, num_key_tiles, num_query_tiles

SCORE_BYTES = 64 * 2**20
"""Scores held at once: few enough that the passes of the selection read them from a GPU's cache."""


def block_sparse_index(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    budget: Int[Array, " n"],
    width: int,
    *,
    lengths: Int[Array, " b"],
    q_offset: Int[Array, ""],
) -> tuple[Int[Array, "b n i M"], Int[Array, "b n i"]]:
    """Key tiles before the diagonal for each query tile, ascending, and their count.

    **Arguments:** `budget`: int32 tiles per query tile, the diagonal's two included; `width`: its static maximum.
    `lengths`: int32 `[b]` in [0, s].

    **Returns:** int32 `[b, n, i, max(1, width − 2)]` and `[b, n, i]`.

    Cost: one product of the pooled queries and keys in the inputs' dtype, and a top-k of its rows.
    """
    b, t, n, _ = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    visible = jnp.minimum(lengths, q_offset + t)
    pooled_q = pool(q, QUERY_TILE, visible - q_offset).reshape(b, -1, kv_heads, n // kv_heads, q.shape[-1])
    pooled_k = pool(k, KEY_TILE, visible)
    tiles, slots = num_key_tiles(s), max(1, min(width - 2, num_key_tiles(s)))
    wanted = jnp.broadcast_to(jnp.maximum(budget - 2, 1), (b, n)).reshape(b, kv_heads, -1)
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def some_query_tiles(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        i, q_tile = inputs  # q_tile [b, k, g, h]
        scores = jnp.einsum("bkgh,bskh->bkgs", q_tile, pooled_k, precision=exact, preferred_element_type=jnp.float32)
        return select_tiles(scores, wanted, (q_offset + i * QUERY_TILE) // KEY_TILE, slots)

    count = num_query_tiles(t)
    batch = max(1, min(count, SCORE_BYTES // (4 * b * n * tiles)))
    blocks, block_count = jax.lax.map(
        some_query_tiles, (jnp.arange(count, dtype=jnp.int32), pooled_q.swapaxes(0, 1)), batch_size=batch
    )
    return jnp.moveaxis(blocks, 0, 3).reshape(b, n, count, slots), jnp.moveaxis(block_count, 0, 3).reshape(b, n, count)


def select_tiles(
    scores: Float[Array, "*heads kt"], wanted: Int[Array, "*heads"], past: Int[Array, ""], width: int
) -> tuple[Int[Array, "*heads width"], Int[Array, "*heads"]]:
    """The `wanted` best of the first `past` key tiles, tile 0 among them, ascending; and how many there are."""
    tile = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    scores = jnp.where(tile == 0, jnp.inf, jnp.where(jnp.isnan(scores), -jnp.inf, scores))
    scores = jnp.where(tile < past, scores, -jnp.inf)
    return select.top_k(scores, wanted, width)


def pool(x: Float[Array, "b t n h"], tile: int, valid: Int[Array, " b"]) -> Float[Array, "b i n h"]:
    """Mean of the valid rows of each tile, in x's dtype (computed in float32); zero for a tile without one."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], -1, tile, *x.shape[2:])
    rows = jnp.arange(x.shape[1] * tile, dtype=jnp.int32).reshape(x.shape[1:3])
    keep = rows[None] < valid[:, None, None]
    total = jnp.sum(jnp.where(keep[..., None, None], x, 0), axis=2, dtype=jnp.float32)
    return (total / jnp.maximum(keep.sum(-1), 1)[..., None, None].astype(jnp.float32)).astype(x.dtype)
