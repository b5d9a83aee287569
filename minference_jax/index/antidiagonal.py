"""Key tiles by their antidiagonal sums: an estimate of block mass that sees every query and every key.

In each cell of `stride` queries by `stride` keys only the antidiagonal is scored, as one product of `stride` rows laid
end to end: every row and every column, and any slash through the cell, crosses it. A softmax over the cells of a row,
summed over a tile, stands for the tile's mass; each query tile keeps the fewest tiles that hold `coverage` of it.

Source: XAttention (arXiv 2503.16428) §2. Its tiles are 128 by 128; here 128 queries by 64 keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.index import select
from minference_jax.index.weights import masked_softmax
from pallas_kernels.plan import KEY_TILE, QUERY_TILE, SparsePlan, num_key_tiles, num_query_tiles


def antidiagonal_index(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    blocks: Int[Array, " n"],
    coverage: Float[Array, " n"],
    *,
    stride: int,
    width: int,
    lengths: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
) -> SparsePlan:
    """For each query tile, the fewest key tiles that hold `coverage` of the estimated mass; see the module.

    **Arguments:** `blocks`: most tiles before the diagonal that a query tile of each head may take; `width`: the
    largest of them (static). `coverage`: in (0, 1]; the original's "threshold". `stride` (static): 4, 8, 16 or 32. The
    rest as `vertical_slash_index`. The diagonal and tile 0 are always taken.

    Cost: 1 / stride of what dense scores cost.
    """
    b, t, n, _ = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    count, width = num_query_tiles(t), min(width, num_key_tiles(s))
    share, most = (jnp.broadcast_to(x, (b, n)).reshape(b, kv_heads, -1) for x in (coverage, blocks))
    visible = jnp.minimum(lengths, q_offset + t)
    rows = _cells(q, visible - q_offset, QUERY_TILE, stride).reshape(
        b, count, -1, kv_heads, n // kv_heads, q.shape[-1] * stride
    )
    keys = _cells(k, visible, KEY_TILE, stride, reverse=True)
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def one_tile(i: Int[Array, ""]) -> tuple[Array, Array]:
        some = jax.lax.dynamic_index_in_dim(rows, i, axis=1, keepdims=False)
        scores = jnp.einsum("bpkgh,bskh->bkgps", some, keys, precision=exact, preferred_element_type=jnp.float32)
        start = q_offset + i * QUERY_TILE
        # A cell on the diagonal is half in the future, but its antidiagonal is too: it stays in.
        position = start + stride * jnp.arange(some.shape[1], dtype=jnp.int32)
        key = stride * jnp.arange(keys.shape[1], dtype=jnp.int32)
        seen = (key <= position[:, None]) & (key < visible[:, None, None]) & (position < visible[:, None])[..., None]
        weights = masked_softmax(scores * (scale / stride), seen[:, None, None]).sum(-2)
        mass = weights.reshape(*weights.shape[:-1], -1, KEY_TILE // stride).sum(-1)
        return fewest_tiles(mass, share, start // KEY_TILE, most, width)

    found = jax.lax.map(one_tile, jnp.arange(count, dtype=jnp.int32))
    picked, block_count = (jnp.moveaxis(x, 0, 3).reshape(b, n, count, *x.shape[4:]) for x in found)
    return SparsePlan(blocks=picked, block_count=block_count, clean=True)


def fewest_tiles(
    mass: Float[Array, "*heads kt"],
    coverage: Float[Array, "*heads"],
    past: Int[Array, ""],
    most: Int[Array, "*heads"],
    width: int,
) -> tuple[Int[Array, "*heads width"], Int[Array, "*heads"]]:
    """The fewest of the first `past` tiles, tile 0 among them, that hold `coverage` with those from there on; at most
    `most` of them, of which `width` is the largest."""
    tile = jnp.arange(mass.shape[-1], dtype=jnp.int32)
    scores = jnp.where(tile < past, jnp.where(tile == 0, jnp.inf, mass), -jnp.inf)
    target = coverage * mass.sum(-1) - jnp.where(tile < past, 0, mass).sum(-1)
    budget = jnp.broadcast_to(jnp.minimum(most, width), target.shape)
    return select.top_k(scores, budget, width, select.Enough(mass, target, least=1))


def _cells(
    x: Float[Array, "b t n h"], valid: Int[Array, " b"], tile: int, stride: int, reverse: bool = False
) -> Float[Array, "b c n sh"]:
    """Rows `stride` at a time, end to end (the last first with `reverse`), up to a whole tile; zero past `valid`."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0), (0, 0)))
    x = jnp.where((jnp.arange(x.shape[1]) < valid[:, None])[..., None, None], x, 0)
    x = x.reshape(x.shape[0], -1, stride, *x.shape[2:])
    x = x[:, :, ::-1] if reverse else x
    return x.swapaxes(2, 3).reshape(x.shape[0], x.shape[1], x.shape[3], -1)
