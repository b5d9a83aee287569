"""Blockwise attention in jnp that visits only what the plan names: any platform, any float dtype, differentiable.

One query tile (128 rows) of one group of heads at a time: the diagonal tiles under a causal mask, then the past key
tiles, then the columns, each gathered `STEP` keys at a time into an online softmax. Trip counts are read from the
plan, so the work follows the plan's counts and not its static widths; nothing of size [t, s] ever exists.

Without a plan every past key is visited: that is dense causal attention in the same loop, with contiguous slices
where the plan needs gathers.

Cost: 4 · (visited keys rounded up to STEP) · h operations a row. Memory: inputs, output, and a few
[heads at once, 128, STEP] float32 arrays. It loses to a fused kernel wherever there is one; on a GPU it is the
fallback for what the kernels cannot serve.
"""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Device
from pallas_kernels.plan import SparsePlan, kv_limit
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE, num_key_tiles, num_query_tiles
from pallas_kernels.xla.visits import STEP, UNITS, Prepared, Visit, visit_of

_MASKED = -1e30
"""Score of a masked cell. Finite, so that a step without a single visible key stays free of NaN; such a step's
garbage is scaled by exp(-1e30 - max) = 0 as soon as a real key is seen, and every valid row sees its own key."""


def unsupported_reason(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan | None,
    *,
    device: Device | None,
) -> None:
    """None: this backend serves every call. See `backends.UnsupportedReason`."""


def attend(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan | None,
    *,
    lengths: Int[Array, " b"] | None,
    q_offset: Int[Array, ""],
    scale: float,
    return_lse: bool,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """`xla_attention`, as `backends.Attend` wants it."""
    return xla_attention(q, k, v, plan, lengths=lengths, q_offset=q_offset, scale=scale)


def xla_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan | None,
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Attention over the keys of `plan` (None: over every causal key), and its log-sum-exp.

    Arguments and results as `pallas_kernels.reference.reference_attention`. Differentiable in q, k and v (reverse
    mode; the backward pass visits the same keys again).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    limit = kv_limit(lengths, q.shape[0], k.shape[1])
    return _compiled_attention(q, k, v, plan, limit, jnp.asarray(q_offset, jnp.int32), scale)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, plan, limit, q_offset, scale):
    return _forward(q, k, v, plan, limit, q_offset, scale)


def _attention_fwd(q, k, v, plan, limit, q_offset, scale):
    out, lse = _forward(q, k, v, plan, limit, q_offset, scale)
    return (out, lse), (q, k, v, plan, limit, q_offset, out, lse)


def _attention_bwd(scale, saved, cotangents):
    q, k, v, plan, limit, q_offset, out, lse = saved
    dq, dk, dv = _backward(q, k, v, plan, limit, q_offset, scale, out, lse, *cotangents)
    return dq, dk, dv, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)
# One program even where the caller is not compiled: op by op it would be hundreds of small ones.
_compiled_attention = jax.jit(_attention, static_argnums=6)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Arrays regrouped for the loops: `p` pairs of (sequence, KV head) at once, outer loop over the rest (`o`)."""

    batch: int
    kv_heads: int
    at_once: int

    @staticmethod
    def of(q: Array, k: Array) -> _Grid:
        pairs = q.shape[0] * k.shape[2]
        # A CPU runs one group's matrix products at full rate, and a loop over groups lets each stop at its own
        # count; an accelerator needs all heads at once to fill the chip.
        return _Grid(q.shape[0], k.shape[2], 1 if _on_cpu() else pairs)

    def queries(self, x: Array, rows: int) -> Array:
        """[b, t, n, ...] -> [o, p, g, rows, ...], zero-padded from t to `rows`."""
        x = jnp.pad(x, [(0, 0), (0, rows - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(self.batch, rows, self.kv_heads, -1, *x.shape[3:])
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(-1, self.at_once, *x.shape[2:])

    def rows(self, x: Array, t: int) -> Array:
        """The inverse of `queries`."""
        x = x.reshape(self.batch, self.kv_heads, *x.shape[2:])
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(self.batch, x.shape[1], -1, *x.shape[4:])[:, :t]

    def keys(self, x: Array, rows: int) -> Array:
        """[b, s, k, h] -> [o, p, rows, h], zero-padded from s to `rows`."""
        x = jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
        return x.reshape(-1, self.at_once, *x.shape[2:])

    def positions(self, x: Array, s: int) -> Array:
        """The inverse of `keys`."""
        return x.reshape(self.batch, self.kv_heads, *x.shape[2:]).swapaxes(1, 2)[:, :s]

    def per_head(self, tree: Any) -> Any:
        """Leaves [b, n, ...] -> [o, p, g, ...]."""
        return jax.tree.map(lambda x: x.reshape(-1, self.at_once, x.shape[1] // self.kv_heads, *x.shape[2:]), tree)

    def per_sequence(self, x: Array) -> Array:
        """[b] -> [o, p]."""
        return jnp.repeat(x, self.kv_heads).reshape(-1, self.at_once)


def _gather(x: Float[Array, "p s h"], positions: Int[Array, "p g w"]) -> Float[Array, "p g w h"]:
    """Rows at positions; out of range ones are clipped (their weight is zero)."""
    return jax.vmap(lambda rows, index: rows.at[index].get(mode="clip"))(x, positions)


def _load(
    x: Float[Array, "p s h"], column_rows: Float[Array, "p g C h"] | None, visit: Visit, step: Int[Array, ""]
) -> Array:
    """Keys or values of a step: [p, w, h] where all heads share them (dense), else [p, g, w, h]."""
    start, column_tile = visit.sources(step)
    if visit.tiles is None:
        return lax.dynamic_slice_in_dim(x, start[0], STEP, axis=1)
    if not _on_cpu():
        return _gather(x, visit.positions(step))
    # A CPU copies slices at memory speed; its gathers compute an address for every element.
    p, g, h = *visit.units.shape, x.shape[-1]

    def unit(a: int, b: int, c: int) -> Array:
        rows = lax.dynamic_slice(x, (a, start[a, b, c], 0), (1, KEY_TILE, h))[0]
        if column_rows is None or column_tile is None:
            return rows
        place = (a, b, jnp.maximum(column_tile[a, b, c], 0) * KEY_TILE, 0)
        from_columns = lax.dynamic_slice(column_rows, place, (1, 1, KEY_TILE, h))[0, 0]
        return jnp.where(column_tile[a, b, c] >= 0, from_columns, rows)

    units = [unit(a, b, c) for a in range(p) for b in range(g) for c in range(UNITS)]
    return jnp.concatenate(units).reshape(p, g, STEP, h)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _scores(q: Float[Array, "p g t h"], keys: Array, scale: float) -> Float[Array, "p g t w"]:
    product = "pgth,psh->pgts" if keys.ndim == 3 else "pgth,pgsh->pgts"
    return jnp.einsum(product, q, keys, preferred_element_type=jnp.float32) * scale


def _weighted(weights: Float[Array, "p g t w"], values: Array) -> Float[Array, "p g t h"]:
    product = "pgts,psh->pgth" if values.ndim == 3 else "pgts,pgsh->pgth"
    return jnp.einsum(product, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


def _diagonal(k, v, q0):
    """Keys, values and causal mask [128, 128] of the diagonal tiles."""
    row = jnp.arange(QUERY_TILE)
    keys, values = (lax.dynamic_slice_in_dim(x, q0, QUERY_TILE, axis=1) for x in (k, v))
    return keys, values, row[None, :] <= row[:, None]


def _without_padding(x: Float[Array, "b s k h"], limit: Int[Array, " b"]) -> Float[Array, "b s k h"]:
    """Zeros past each sequence's length: a weight of 0 would not silence a NaN that the padding holds."""
    inside = jnp.arange(x.shape[1]) < limit[:, None]
    return jnp.where(inside[:, :, None, None], x, jnp.zeros((), x.dtype))


def _lanes(tiles: int) -> int:
    return min(tiles, os.cpu_count() or 1, 4) if _on_cpu() else 1


def _padded_lengths(q: Array, k: Array) -> tuple[int, int]:
    rows = num_query_tiles(q.shape[1]) * QUERY_TILE
    # Room for a diagonal that starts in the last key tile, and for a dense step that ends past it.
    return rows, num_key_tiles(k.shape[1]) * KEY_TILE + STEP


def _forward(q, k, v, plan, limit, q_offset, scale):
    grid, (rows, padded), s = _Grid.of(q, k), _padded_lengths(q, k), k.shape[1]
    prepared, queries = None if plan is None else Prepared.of(plan, s), grid.queries(q, rows)
    k, v = (_without_padding(x, limit) for x in (k, v))
    heads = (queries, grid.keys(k, padded), grid.keys(v, padded), grid.per_head(prepared), grid.per_sequence(limit))

    def query_tile(i, head, column_keys, column_values):
        queries, keys, values, prepared, limit = head
        q0 = q_offset + i * QUERY_TILE
        q_tile = lax.dynamic_slice_in_dim(queries, i * QUERY_TILE, QUERY_TILE, axis=2)
        visit = visit_of(prepared, i, limit, q_offset, s, q_tile.shape[1])
        diagonal_keys, diagonal_values, mask = _diagonal(keys, values, q0)
        scores = jnp.where(mask, _scores(q_tile, diagonal_keys, scale), _MASKED)
        top = scores.max(-1)
        weights = jnp.exp(scores - top[..., None])
        carry = _weighted(weights, diagonal_values), top, weights.sum(-1)

        def step(j, carry):
            acc, top, total = carry
            bias = jnp.where(visit.visible(j), jnp.float32(0), jnp.float32(_MASKED))[..., None, :]
            scores = _scores(q_tile, _load(keys, column_keys, visit, j), scale) + bias
            new_top = jnp.maximum(top, scores.max(-1))
            weights, decay = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            acc = acc * decay[..., None] + _weighted(weights, _load(values, column_values, visit, j))
            return acc, new_top, total * decay + weights.sum(-1)

        acc, top, total = lax.fori_loop(0, visit.steps, step, carry)
        valid_row = q0 + jnp.arange(QUERY_TILE, dtype=jnp.int32) < limit[:, None, None]
        out = jnp.where(valid_row[..., None], acc / total[..., None], jnp.float32(0)).astype(q.dtype)
        return out, jnp.where(valid_row, top + jnp.log(total), -jnp.inf)

    def head_group(head):
        _, keys, values, prepared, _ = head
        columns = None if prepared is None else prepared.columns  # gathered once here, read by every query tile
        column_rows = [None if columns is None else _gather(x, columns) for x in (keys, values)]
        # XLA runs independent loops on different CPU cores, where the matrix products of one step are too small for
        # two; lane j takes query tiles j, j + lanes, ...
        tiles, lanes = rows // QUERY_TILE, _lanes(rows // QUERY_TILE)
        per_lane = [
            lax.map(lambda i: query_tile(i, head, *column_rows), jnp.arange(lane, tiles, lanes, dtype=jnp.int32))
            for lane in range(lanes)
        ]
        order = np.argsort(np.concatenate([np.arange(lane, tiles, lanes) for lane in range(lanes)]))
        out, lse = (jnp.concatenate(parts)[order] for parts in zip(*per_lane, strict=True))
        # [i, p, g, 128, ...] -> [p, g, rows, ...]
        return tuple(jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], rows, *x.shape[4:]) for x in (out, lse))

    out, lse = lax.map(head_group, heads)
    return grid.rows(out, q.shape[1]), grid.rows(lse, q.shape[1])


def _backward(q, k, v, plan, limit, q_offset, scale, out, lse, d_out, d_lse):
    """Gradients by recomputing the weights from the saved log-sum-exp, over the same visits as the forward pass."""
    grid, (rows, padded), s = _Grid.of(q, k), _padded_lengths(q, k), k.shape[1]
    prepared, f32 = None if plan is None else Prepared.of(plan, s), jnp.float32
    # d score = weight · (d weight − Σ out · d out + d lse): the bracket's row-wise part, once for all visits.
    shift = d_lse - (out.astype(f32) * d_out.astype(f32)).sum(-1)
    shift, lse = jnp.where(jnp.isfinite(lse), shift, f32(0)), jnp.where(jnp.isfinite(lse), lse, f32(0))
    per_row = tuple(grid.queries(x, rows) for x in (q, d_out.astype(f32), shift, lse))
    k, v = (_without_padding(x, limit) for x in (k, v))
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
                weights = jnp.exp(_scores(q_tile, key_rows, scale) - lse[..., None])
                weights = jnp.where(visible & valid_row[..., None], weights, f32(0))
                d_weights = _scores(d_out, value_rows.astype(f32), 1.0)
                d_scores = weights * (d_weights + shift[..., None]) * scale
                d_q = _weighted(d_scores, key_rows.astype(f32))
                shared = key_rows.ndim == 3  # one set of keys for the whole group: sum over its heads
                to_keys = "pgts,pgth->psh" if shared else "pgts,pgth->pgsh"
                return d_q, jnp.einsum(to_keys, d_scores, q_tile.astype(f32)), jnp.einsum(to_keys, weights, d_out)

            def rows_at(x, position):
                if position.ndim == 1:
                    return lax.dynamic_slice_in_dim(x, position[0], STEP, axis=1)
                return _gather(x, position)

            def add(total, update, position):
                if position.ndim == 1:
                    old = lax.dynamic_slice_in_dim(total, position[0], position.shape[0], axis=1)
                    return lax.dynamic_update_slice_in_dim(total, old + update, position[0], axis=1)
                return jax.vmap(lambda rows, index, rows_update: rows.at[index].add(rows_update, mode="drop"))(
                    total, position, update
                )

            def step(j, carry):
                d_q, d_k, d_v = carry
                position, visible = visit.positions(j), visit.visible(j)[..., None, :]
                update = gradients(rows_at(keys, position), rows_at(values, position), visible)
                return d_q + update[0], add(d_k, update[1], position), add(d_v, update[2], position)

            d_k, d_v = carry
            diagonal_keys, diagonal_values, mask = _diagonal(keys, values, q0)
            update = gradients(diagonal_keys, diagonal_values, mask)
            diagonal = q0 + jnp.arange(QUERY_TILE, dtype=jnp.int32)
            carry = update[0], add(d_k, update[1], diagonal), add(d_v, update[2], diagonal)
            d_q, d_k, d_v = lax.fori_loop(0, visit.steps, step, carry)
            return (d_k, d_v), d_q

        zeros = jnp.zeros(keys.shape, f32)
        (d_k, d_v), d_q = lax.scan(query_tile, (zeros, zeros), jnp.arange(rows // QUERY_TILE, dtype=jnp.int32))
        d_q = jnp.moveaxis(d_q, 0, 2)
        return d_q.reshape(*d_q.shape[:2], rows, d_q.shape[-1]), d_k, d_v

    d_q, d_k, d_v = lax.map(head_group, heads)
    d_q, d_k, d_v = grid.rows(d_q, q.shape[1]), grid.positions(d_k, s), grid.positions(d_v, s)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)
