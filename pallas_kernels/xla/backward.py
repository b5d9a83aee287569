"""The gradient of attention over a plan in jnp, for every backend: the weights are computed again, from the LSE.

The backward pass visits the keys that the forward pass visited, one query tile at a time. It needs nothing of the
forward pass but the output and the log-sum-exp, so a kernel without a backward pass of its own can use it.

Cost: 10 · (visited keys rounded up to STEP) · h operations a row. Memory: float32 gradients of q, k and v, float32
copies of q's gradient rows, and a few [heads at once, 128, STEP] arrays; it grows with t and s, never with t · s.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.plan import SparsePlan
from pallas_kernels.sizes import QUERY_TILE
from pallas_kernels.tracing import sum_as, vary_alike
from pallas_kernels.xla.grid import (
    Grid,
    diagonal_tiles,
    gather,
    only_finite,
    only_visible,
    padded_lengths,
    scores_of,
    weighted_sum,
    without_padding,
)
from pallas_kernels.xla.visits import STEP, Prepared, visit_of


def attention_backward(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan | None,
    limit: Int[Array, " b"],
    q_offset: Int[Array, ""],
    out: Float[Array, "b t n h"],
    lse: Float[Array, "b t n"],
    d_out: Float[Array, "b t n h"],
    d_lse: Float[Array, "b t n"],
    *,
    scale: float,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b s k h"], Float[Array, "b s k h"]]:
    """Gradients of q, k and v, in their dtypes.

    **Arguments:** what the forward pass had and gave: `limit`: int32 `[b]`, the keys of each sequence; `out` and `lse`,
    and the gradients of both. Rows at or past `limit` may hold anything in all of them: they count nowhere.
    """
    primals = q, k, v
    q, k, v, plan, limit, q_offset, out, lse, d_out, d_lse = vary_alike(
        (q, k, v, plan, limit, q_offset, out, lse, d_out, d_lse)
    )
    grid, (rows, padded), s = Grid.of(q, k), padded_lengths(q, k), k.shape[1]
    prepared, f32 = Prepared.of(plan, s), jnp.float32
    q, out, d_out = (without_padding(x, limit, q_offset) for x in (q, out, d_out))
    d_lse, lse = (without_padding(x[..., None], limit, q_offset)[..., 0] for x in (d_lse, lse))
    # d score = weight · (d weight − Σ out · d out + d lse): the bracket's row-wise part, once for all visits.
    shift = d_lse - (out.astype(f32) * d_out.astype(f32)).sum(-1)
    per_row = tuple(grid.queries(x, rows) for x in (q, d_out.astype(f32), shift, lse))
    k, v = (without_padding(x, limit) for x in (k, v))
    heads = (per_row, grid.keys(k, padded), grid.keys(v, padded), grid.per_head(prepared), grid.per_sequence(limit))

    def head_group(head):
        per_row, keys, values, prepared, limit = head

        def query_tile(carry, i):
            q0 = q_offset + i * QUERY_TILE
            tile = tuple(lax.dynamic_slice_in_dim(x, i * QUERY_TILE, QUERY_TILE, axis=2) for x in per_row)
            q_tile, d_out, shift, lse = tile
            valid_row = q0 + jnp.arange(QUERY_TILE, dtype=jnp.int32) < limit[:, None, None]
            visit = visit_of(prepared, i, limit, q_offset, s, q_tile.shape[1])

            def gradients(key_rows, value_rows, visible):
                visible = visible & valid_row[..., None]
                weights = jnp.where(visible, jnp.exp(scores_of(q_tile, key_rows, scale) - lse[..., None]), f32(0))
                d_weights = scores_of(d_out, value_rows.astype(f32), 1.0)
                d_scores = jnp.where(visible, weights * (d_weights + shift[..., None]) * scale, f32(0))
                # Rows that see a NaN have one in their weights: the keys' own would reach the rows before them too.
                d_q = weighted_sum(d_scores, only_finite(key_rows).astype(f32))
                shared = key_rows.ndim == 3  # one set of keys for the whole group: sum over its heads
                to_keys = "pgts,pgth->psh" if shared else "pgts,pgth->pgsh"
                return d_q, jnp.einsum(to_keys, d_scores, q_tile.astype(f32)), jnp.einsum(to_keys, weights, d_out)

            def rows_at(x, position):
                if position.ndim == 1:
                    return lax.dynamic_slice_in_dim(x, position[0], STEP, axis=1)
                return gather(x, position)

            def add(total, update, position):
                if position.ndim == 1:
                    old = lax.dynamic_slice_in_dim(total, position[0], position.shape[0], axis=1)
                    return lax.dynamic_update_slice_in_dim(total, old + update, position[0], axis=1)
                return jax.vmap(lambda rows, index, rows_update: rows.at[index].add(rows_update, mode="drop"))(
                    total, position, update
                )

            def step(j, carry):
                d_q, d_k, d_v = carry
                position, visible = visit.positions(j), visit.visible(j)
                key_rows, value_rows = (only_visible(rows_at(x, position), visible) for x in (keys, values))
                update = gradients(key_rows, value_rows, visible[..., None, :])
                return d_q + update[0], add(d_k, update[1], position), add(d_v, update[2], position)

            d_k, d_v = carry
            diagonal_keys, diagonal_values, mask = diagonal_tiles(keys, values, q0)
            update = gradients(diagonal_keys, diagonal_values, mask)
            diagonal = q0 + jnp.arange(QUERY_TILE, dtype=jnp.int32)
            carry = update[0], add(d_k, update[1], diagonal), add(d_v, update[2], diagonal)
            d_q, d_k, d_v = lax.fori_loop(0, visit.steps, step, carry)
            return (d_k, d_v), d_q

        zeros = jnp.zeros_like(keys, dtype=f32)
        (d_k, d_v), d_q = lax.scan(query_tile, (zeros, zeros), jnp.arange(rows // QUERY_TILE, dtype=jnp.int32))
        d_q = jnp.moveaxis(d_q, 0, 2)
        return d_q.reshape(*d_q.shape[:2], rows, d_q.shape[-1]), d_k, d_v

    d_q, d_k, d_v = lax.map(head_group, heads)
    d_q, d_k, d_v = grid.rows(d_q, q.shape[1]), grid.positions(d_k, s), grid.positions(d_v, s)
    found = zip((d_q, d_k, d_v), primals, strict=True)
    d_q, d_k, d_v = (sum_as(gradient, primal).astype(primal.dtype) for gradient, primal in found)
    return d_q, d_k, d_v
