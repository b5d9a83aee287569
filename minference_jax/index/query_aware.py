"""Heads that follow their queries get blocks, the others columns and slashes: a test on each prompt decides.

Pooled queries and keys are cheap but blind to what a pool averages away. So each head is tested where the truth is
known: the distribution over key tiles of its last 128 rows' attention, against what pooling makes of them. If the two
are close, pooled scores pick the tiles of every query tile; if not, the head is vertical-slash. Both keep the fewest
entries that hold `coverage` of the estimated mass.

Source: FlexPrefill (arXiv 2502.20766) §3, Algorithms 1 to 4. There the mass of all query tiles is ranked together;
here each query tile holds its share, so widths are static. Its tiles are 128 by 128; here 128 queries by 64 keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.index.antidiagonal import fewest_tiles
from minference_jax.index.block_sparse import pool
from minference_jax.index.vertical_slash import Widths, vertical_slash_index
from minference_jax.index.weights import masked_softmax, probe_weights
from pallas_kernels.plan import KEY_TILE, QUERY_TILE, SparsePlan, num_key_tiles, num_query_tiles


def query_aware_index(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    budgets: dict[str, Array],
    *,
    blocks: int,
    columns: int,
    tiles: int,
    lengths: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
) -> SparsePlan:
    """Blocks for heads whose pooled estimate is right on the last rows, vertical-slash for the others; see the module.

    **Arguments:** `budgets`: arrays `[n]`: int32 `blocks`, `columns` and `tiles`, the most that a query tile, or a
    head, may take; float32 `coverage`, the share of estimated mass to hold (γ of the original), and `divergence`, the
    largest square root of the Jensen-Shannon divergence (natural logarithm; at most 0.83) between estimate and truth
    for which a head gets blocks (τ). `blocks`, `columns`, `tiles` (static): the largest budgets. The rest as
    `vertical_slash_index`.
    """
    visible = jnp.minimum(lengths, q_offset + q.shape[1])
    keys = pool(k, KEY_TILE, visible)
    divergent = _divergence_of_pooling(q, k, keys, visible, q_offset, scale)
    aware = divergent <= budgets["divergence"]
    picked, block_count = _pick_blocks(q, keys, budgets, blocks, visible, q_offset, scale)
    lines = {name: budgets[name] for name in ("columns", "tiles", "coverage")}
    lines |= {
        "slashes": jnp.zeros_like(lines["columns"]),
        "spread": jnp.zeros(lines["columns"].shape, bool),
        "threshold": jnp.full(lines["columns"].shape, jnp.inf, jnp.float32),
    }
    widths = Widths(columns=columns, tiles=tiles, coverage=True)
    found = vertical_slash_index(q, k, lines, widths, lengths=lengths, q_offset=q_offset, scale=scale)
    assert found.column_count is not None and found.band_count is not None
    return SparsePlan(
        found.columns,
        jnp.where(aware, 0, found.column_count),
        found.bands,
        jnp.where(aware, 0, found.band_count),
        picked,
        jnp.where(aware[..., None], block_count, 0),
        band_multiple=KEY_TILE,
        clean=True,
    )


def _divergence_of_pooling(
    q: Array, k: Array, pooled_k: Array, visible: Int[Array, " b"], q_offset: Int[Array, ""], scale: float
) -> Float[Array, "b n"]:
    """How far each head's pooled scores of the last (up to) 128 valid rows are from their attention."""
    b, t, n, h = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    size = min(QUERY_TILE, t)
    rows = (visible - q_offset)[:, None] - size + jnp.arange(size, dtype=jnp.int32)
    last = jnp.take_along_axis(q, jnp.clip(rows, 0, t - 1)[..., None, None], axis=1, mode="clip")
    last = jnp.where((rows >= 0)[..., None, None], last, 0)
    grouped = last.reshape(b, -1, kv_heads, n // kv_heads, h)
    position = jnp.where(rows >= 0, rows + q_offset, -1)
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def truth(head: Int[Array, ""]) -> Float[Array, "b kt"]:
        # One query head at a time: float32 scores of 128 rows with a million keys are 512 MiB.
        queries = jax.lax.dynamic_index_in_dim(last, head, axis=2, keepdims=False)
        keys = jax.lax.dynamic_index_in_dim(k, head // (n // kv_heads), axis=2, keepdims=False)
        scores = jnp.einsum("bph,bsh->bps", queries, keys, precision=exact, preferred_element_type=jnp.float32)
        weights = probe_weights(scores, scale, position)
        weights = jnp.pad(weights.sum(-2), ((0, 0), (0, -s % KEY_TILE)))
        return weights.reshape(b, -1, KEY_TILE).sum(-1)

    held = jnp.moveaxis(jax.lax.map(truth, jnp.arange(n, dtype=jnp.int32)), 0, 1)
    valid = jnp.maximum(jnp.sum(rows >= 0, axis=1), 1).astype(jnp.float32)
    mean = (grouped.sum(1, dtype=jnp.float32) / valid[:, None, None, None]).astype(q.dtype)
    scores = jnp.einsum("bkgh,bskh->bkgs", mean, pooled_k, precision=exact, preferred_element_type=jnp.float32)
    tile = jnp.arange(num_key_tiles(s), dtype=jnp.int32)
    guess = masked_softmax(scores.reshape(b, n, -1) * scale, (tile * KEY_TILE < visible[:, None])[:, None])
    return divergence(held / valid[:, None, None], guess)


def _pick_blocks(
    q: Array,
    pooled_k: Array,
    budgets: dict[str, Array],
    width: int,
    visible: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
) -> tuple[Int[Array, "b n i M"], Int[Array, "b n i"]]:
    """For each query tile the fewest key tiles that hold the coverage by the pooled scores."""
    b, t, n, h = q.shape
    kv_heads, width = pooled_k.shape[2], min(width, pooled_k.shape[1])
    share, most = (jnp.broadcast_to(x, (b, n)) for x in (budgets["coverage"], budgets["blocks"]))
    queries = pool(q, QUERY_TILE, visible - q_offset).reshape(b, -1, kv_heads, n // kv_heads, h)
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    tile = jnp.arange(pooled_k.shape[1], dtype=jnp.int32)

    def one_tile(i: Int[Array, ""]) -> tuple[Array, Array]:
        some = jax.lax.dynamic_index_in_dim(queries, i, axis=1, keepdims=False)
        scores = jnp.einsum("bkgh,bskh->bkgs", some, pooled_k, precision=exact, preferred_element_type=jnp.float32)
        past = (q_offset + i * QUERY_TILE) // KEY_TILE
        seen = (tile < past + QUERY_TILE // KEY_TILE) & (tile * KEY_TILE < visible[:, None])
        mass = masked_softmax(scores.reshape(b, n, -1) * scale, seen[:, None])
        return fewest_tiles(mass, share, past, most, width)

    count = num_query_tiles(t)
    found = jax.lax.map(one_tile, jnp.arange(count, dtype=jnp.int32))
    blocks, block_count = (jnp.moveaxis(x, 0, 2) for x in found)
    return blocks, block_count


def divergence(p: Float[Array, "*heads x"], q: Float[Array, "*heads x"]) -> Float[Array, "*heads"]:
    """Square root of the Jensen-Shannon divergence of two distributions, natural logarithm."""
    middle = (p + q) / 2

    def against(x: Array) -> Array:
        return jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1) / jnp.where(x > 0, middle, 1)), 0).sum(-1)

    return jnp.sqrt(jnp.maximum((against(p) + against(q)) / 2, 0))
