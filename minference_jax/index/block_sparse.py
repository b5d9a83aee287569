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

SCORE_BYTES = 128 * 2**20
"""Scores held at once: enough that the many small steps of a selection are amortised. (With 32 MiB, which stay in an
H100's cache, it takes a fifth longer.)"""


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

    Cost: one product of the pooled queries and keys, and a top-k of its rows. Scores have the inputs' dtype, as the
    original's do: 16-bit scores take half the passes and half the bytes.
    """
    b, t, n, _ = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    visible = jnp.minimum(lengths, q_offset + t)
    pooled_q, pooled_k = pool(q, QUERY_TILE, visible - q_offset), pool(k, KEY_TILE, visible)
    tiles, slots, count = num_key_tiles(s), max(1, min(width - 2, num_key_tiles(s))), num_query_tiles(t)
    wanted = jnp.broadcast_to(jnp.maximum(budget - 2, 1), (b, n)).reshape(b, kv_heads, -1, 1)
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    at_once = max(1, min(count, SCORE_BYTES // (q.dtype.itemsize * b * n * tiles)))
    steps = -(-count // at_once)
    pooled_q = jnp.pad(pooled_q, ((0, 0), (0, steps * at_once - count), (0, 0), (0, 0)))
    pooled_q = pooled_q.reshape(b, steps, at_once, kv_heads, n // kv_heads, -1)
    pooled_q = jnp.einsum("bcikgh->cbkgih", pooled_q).reshape(steps, b, kv_heads, -1, q.shape[-1])

    def some_query_tiles(step: Int[Array, ""]) -> tuple[Array, Array]:
        scores = jnp.einsum(
            "bkph,bskh->bkps", pooled_q[step], pooled_k, precision=exact, preferred_element_type=q.dtype
        ).reshape(b, kv_heads, n // kv_heads, at_once, tiles)
        i = step * at_once + jnp.arange(at_once, dtype=jnp.int32)
        return select_tiles(scores, wanted, (q_offset + i * QUERY_TILE) // KEY_TILE, slots)

    found = jax.lax.map(some_query_tiles, jnp.arange(steps, dtype=jnp.int32))

    def gathered(x: Int[Array, "steps b k g i *M"]) -> Int[Array, "b n i *M"]:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(b, n, steps * at_once, *x.shape[5:])[:, :, :count]

    blocks, block_count = map(gathered, found)
    return blocks, block_count


def select_tiles(
    scores: Float[Array, "*heads i kt"], wanted: Int[Array, "*heads #i"], past: Int[Array, " i"], width: int
) -> tuple[Int[Array, "*heads i width"], Int[Array, "*heads i"]]:
    """The `wanted` best of the first `past` key tiles, tile 0 among them, ascending; and how many there are."""
    tile = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    scores = jnp.where(tile == 0, jnp.inf, jnp.where(jnp.isnan(scores), -jnp.inf, scores))
    scores = jnp.where(tile < past[:, None], scores, -jnp.inf)
    return select.top_k(scores, jnp.broadcast_to(wanted, scores.shape[:-1]), width)


def pool(x: Float[Array, "b t n h"], tile: int, valid: Int[Array, " b"]) -> Float[Array, "b i n h"]:
    """Mean of the valid rows of each tile, in x's dtype (computed in float32); zero for a tile without one."""
    b, _, n, h = x.shape
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0), (0, 0)))
    x = x.reshape(b, -1, tile, n * h)  # heads as part of the rows: with axes of their own, XLA copies x to transpose it
    rows = jnp.arange(x.shape[1] * tile, dtype=jnp.int32).reshape(x.shape[1:3])
    keep = rows[None] < valid[:, None, None]
    total = jnp.sum(jnp.where(keep[..., None], x, 0), axis=2, dtype=jnp.float32)
    mean = total / jnp.maximum(keep.sum(-1), 1)[..., None].astype(jnp.float32)
    return mean.astype(x.dtype).reshape(b, -1, n, h)
