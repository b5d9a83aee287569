"""The error of a head's output: many plans against dense attention, at a sample of query rows, in chunks of keys.

Let p be the dense causal softmax weights of a query row, and m the plan's bits, one for each key. The row's output
under the plan is

    Σ p m v / Σ p m.

So scores and exponentials are computed once for all plans. Each plan adds one masked product.

Source: MInference (arXiv 2407.02490) §3.2, Algorithm 1, compares outputs too; its released code compares weights.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from minference_jax.index import select
from pallas_kernels.plan import KEY_TILE, QUERY_TILE

WORD = 32
"""Keys of one word of a bitmap."""

ROWS = 16
"""Rows scored in each query tile, every eighth: neighbours have much the same attention, far tiles do not."""

CHUNK_BYTES = 32 * 2**20
"""Masked weights held at once; decides how many keys a chunk has."""


class HeadErrors(NamedTuple):
    """Of each plan c, sample b and head n, over the scored rows; float32 `[c, b, n]`.

    - `error`: ‖output − dense output‖ / ‖dense output‖, all rows taken together.
    - `recall`: mean over rows of the dense softmax mass on visited keys.
    """

    error: Float[Array, "c b n"]
    recall: Float[Array, "c b n"]


@partial(jax.jit, static_argnames="scale")
def output_errors(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    visited: UInt32[Array, "c b n i w"],
    query_tiles: Int[Array, " i"],
    lengths: Int[Array, " b"],
    scale: float | None = None,
) -> HeadErrors:
    """Output error and recall of c plans, at `ROWS` rows of each of the query tiles numbered `query_tiles`.

    `visited`: the keys that the plans visit, as in `PlanMasks`. Products are in the inputs' dtype with float32 sums,
    softmax in float32.

    Memory: `CHUNK_BYTES`, the masks, and their copy; nothing of size t × t. Cost: c + 3 times that of dense attention
    for i · `ROWS` rows.
    """
    b, t, n, h = q.shape
    kv_heads, plans, count = k.shape[2], visited.shape[0], query_tiles.shape[0]
    g = n // kv_heads
    factor = jnp.float32(h**-0.5 if scale is None else scale)
    chunk = _chunk(g * (plans + 1) * ROWS * v.dtype.itemsize, t)
    padded = -(-t // chunk) * chunk
    offsets = (jnp.arange(ROWS, dtype=jnp.int32) * 2 + 1) * (QUERY_TILE // ROWS // 2)
    positions = query_tiles[:, None] * QUERY_TILE + offsets
    sampled = jnp.take(q, positions.reshape(-1), axis=1, mode="clip")

    def groups(x: Array, axis: int) -> Array:
        """[b, …, n or k heads, …] with the heads at `axis` → [b · k, …, heads of the group, …]."""
        x = jnp.moveaxis(x, axis, 1)
        x = x.reshape(b * kv_heads, x.shape[1] // kv_heads, *x.shape[2:])
        return jnp.moveaxis(x, 1, axis)

    def widened(x: Array, axis: int, size: int) -> Array:
        return jnp.pad(x, [(0, size - x.shape[axis]) if a == axis else (0, 0) for a in range(x.ndim)])

    per_group = {
        "q": groups(sampled.reshape(b, count, ROWS, n, h), 3).swapaxes(2, 3),  # [·, i, g, r, h]
        "k": groups(widened(k, 1, padded), 2)[:, :, 0],
        "v": groups(widened(jnp.concatenate([v, jnp.ones((b, t, kv_heads, 1), v.dtype)], -1), 1, padded), 2)[:, :, 0],
        "visited": groups(widened(jnp.moveaxis(visited, (0, 3), (2, 1)), 4, padded // WORD), 3),  # [·, i, c, g, w]
        "length": jnp.repeat(lengths, kv_heads),
    }
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)

    def one_group(group: dict[str, Array]) -> tuple[Array, Array]:
        def some_rows(at: tuple[Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            rows, position, words = at  # [g, r, h], [r], [c, g, w]
            steps = (position[-1] + chunk) // chunk
            keys = jnp.arange(chunk, dtype=jnp.int32)

            def scores(j: Array) -> Float[Array, "g r s"]:
                s = product("grh,sh->grs", rows, jax.lax.dynamic_slice_in_dim(group["k"], j * chunk, chunk))
                key = j * chunk + keys
                return jnp.where((key <= position[:, None]) & (key < group["length"]), s * factor, -jnp.inf)

            def softmax(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                top, total = carry
                s = scores(j)
                new = jnp.maximum(top, s.max(-1))
                return new, total * jnp.exp(top - new) + jnp.exp(s - new[..., None]).sum(-1)

            start = jnp.full((g, ROWS), -3e38, jnp.float32), jnp.zeros((g, ROWS), jnp.float32)
            top, total = jax.lax.fori_loop(0, steps, softmax, start)
            lse = top + jnp.log(jnp.maximum(total, 1e-30))
            valid = position < group["length"]

            def outputs(j: Array, out: Float[Array, "c g r outputs"]) -> Float[Array, "c g r outputs"]:
                weights = jnp.where(valid[:, None], jnp.exp(scores(j) - lse[..., None]), 0).astype(v.dtype)
                seen = jax.lax.dynamic_slice_in_dim(words, j * (chunk // WORD), chunk // WORD, 2)
                seen = select.unpack(seen, chunk)
                seen = jnp.concatenate([seen, jnp.ones((1, g, chunk), bool)])  # the last plan is dense attention
                masked = jnp.where(seen[:, :, None], weights, jnp.zeros((), v.dtype))
                return out + product(
                    "cgrs,sh->cgrh", masked, jax.lax.dynamic_slice_in_dim(group["v"], j * chunk, chunk)
                )

            out = jax.lax.fori_loop(0, steps, outputs, jnp.zeros((plans + 1, g, ROWS, h + 1), jnp.float32))
            mass, out = out[..., h], out[..., :h] / jnp.maximum(out[..., h:], 1e-30)
            wrong, norm = (jnp.square(x).sum((2, 3)) for x in (out[:-1] - out[-1:], out[-1:]))
            return wrong, norm[0], mass[:-1].sum(-1), valid.sum().astype(jnp.float32)

        wrong, norm, mass, rows = jax.lax.map(some_rows, (group["q"], positions, group["visited"]))  # leading axis i
        error = jnp.sqrt(wrong.sum(0) / jnp.maximum(norm.sum(0), 1e-30))
        recall = jnp.where(rows.sum() > 0, mass.sum(0) / jnp.maximum(rows.sum(), 1), 1)
        return error, jnp.minimum(recall, 1)

    found = jax.lax.map(one_group, per_group)
    return HeadErrors(*(x.reshape(b, kv_heads, plans, g).transpose(2, 0, 1, 3).reshape(plans, b, n) for x in found))


def _chunk(bytes_per_key: int, t: int) -> int:
    keys = max(1, CHUNK_BYTES // bytes_per_key // KEY_TILE) * KEY_TILE
    return min(keys, 4096, -(-t // KEY_TILE) * KEY_TILE)
