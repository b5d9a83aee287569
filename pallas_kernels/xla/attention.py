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
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE
from pallas_kernels.tracing import under_own_settings, vary_alike
from pallas_kernels.xla.backward import attention_backward
from pallas_kernels.xla.grid import (
    Grid,
    diagonal_tiles,
    gather,
    on_cpu,
    only_finite,
    only_visible,
    padded_lengths,
    scores_of,
    weighted_sum,
    without_padding,
)
from pallas_kernels.xla.visits import STEP, UNITS, Prepared, Visit, visit_of

LANE_TILES = 8
"""Least query tiles of a loop that has some of them."""


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
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"] | None]:
    """`xla_attention`, as `backends.Attend` wants it."""
    limit = kv_limit(lengths, q.shape[0], k.shape[1])
    return _compiled_attention(q, k, v, plan, limit, jnp.asarray(q_offset, jnp.int32), scale, return_lse)


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
    return _compiled_attention(q, k, v, plan, limit, jnp.asarray(q_offset, jnp.int32), scale, True)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, plan, limit, q_offset, scale):
    return _forward(q, k, v, plan, limit, q_offset, scale)


@under_own_settings
def _attention_fwd(q, k, v, plan, limit, q_offset, scale):
    out, lse = _forward(q, k, v, plan, limit, q_offset, scale)
    return (out, lse), (q, k, v, plan, limit, q_offset, out, lse)


@under_own_settings
def _attention_bwd(scale: float, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    d_q, d_k, d_v = attention_backward(*saved, *cotangents, scale=scale)
    return d_q, d_k, d_v, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


# One program even where the caller is not compiled: op by op it would be hundreds of small ones.
@partial(jax.jit, static_argnums=(6, 7))
def _compiled_attention(q, k, v, plan, limit, q_offset, scale, return_lse):
    out, lse = _attention(q, k, v, plan, limit, q_offset, scale)  # pyright: ignore[reportGeneralTypeIssues]
    if not return_lse:
        return out, None
    # Padding rows have 0 until here: nothing that only this program sees is infinite (jax_debug_infs).
    valid = q_offset + jnp.arange(q.shape[1], dtype=jnp.int32) < limit[:, None]
    return out, jnp.where(valid[..., None], lse, -jnp.inf)


def _load(
    x: Float[Array, "p s h"], column_rows: Float[Array, "p g C h"] | None, visit: Visit, step: Int[Array, ""]
) -> Array:
    """Keys or values of a step: [p, w, h] where all heads share them (dense), else [p, g, w, h]."""
    start, column_tile = visit.sources(step)
    if visit.tiles is None:
        return lax.dynamic_slice_in_dim(x, start[0], STEP, axis=1)
    if not on_cpu():
        return gather(x, visit.positions(step))
    # A CPU copies slices at memory speed; its gathers compute an address for every element.
    p, g, h = *visit.units.shape, x.shape[-1]

    def of_head(number: Array) -> Array:
        a, b = number // g, number % g

        def unit(c: int) -> Array:
            rows = lax.dynamic_slice(x, (a, start[a, b, c], 0), (1, KEY_TILE, h))[0]
            if column_rows is None or column_tile is None:
                return rows
            place = (a, b, jnp.maximum(column_tile[a, b, c], 0) * KEY_TILE, 0)
            from_columns = lax.dynamic_slice(column_rows, place, (1, 1, KEY_TILE, h))[0, 0]
            return jnp.where(column_tile[a, b, c] >= 0, from_columns, rows)

        return jnp.concatenate([unit(c) for c in range(UNITS)])

    return lax.map(of_head, jnp.arange(p * g, dtype=jnp.int32)).reshape(p, g, STEP, h)


def _diagonal_step(q_tile, keys, values, mask, scale):
    """The sums of an online softmax that begins with the diagonal tiles: values, maxima, weights."""
    scores = jnp.where(mask, scores_of(q_tile, keys, scale), -jnp.inf)
    top = scores.max(-1)
    weights = jnp.exp(scores - top[..., None])
    # A NaN among the values reaches the rows that see its key, not those before it, whose weight of 0 would not help.
    broken = lax.cummax((~jnp.isfinite(values).all(-1)).astype(jnp.int32), axis=1)[:, None, :, None] > 0
    acc = jnp.where(broken, jnp.nan, weighted_sum(weights, only_finite(values)))
    return acc, top, weights.sum(-1)


def _lanes(tiles: int) -> int:
    """Loops that share the query tiles. Each is compiled by itself: a short prompt takes one."""
    return min(max(1, tiles // LANE_TILES), os.cpu_count() or 1, 4) if on_cpu() else 1


def _forward(q, k, v, plan, limit, q_offset, scale):
    q, k, v, plan, limit, q_offset = vary_alike((q, k, v, plan, limit, q_offset))
    grid, (rows, padded), s = Grid.of(q, k), padded_lengths(q, k), k.shape[1]
    prepared, queries = Prepared.of(plan, s), grid.queries(q, rows)
    k, v = (without_padding(x, limit) for x in (k, v))
    heads = (queries, grid.keys(k, padded), grid.keys(v, padded), grid.per_head(prepared), grid.per_sequence(limit))

    def query_tile(i, head, column_keys, column_values):
        queries, keys, values, prepared, limit = head
        q0 = q_offset + i * QUERY_TILE
        q_tile = lax.dynamic_slice_in_dim(queries, i * QUERY_TILE, QUERY_TILE, axis=2)
        visit = visit_of(prepared, i, limit, q_offset, s, q_tile.shape[1])
        carry = _diagonal_step(q_tile, *diagonal_tiles(keys, values, q0), scale)

        def step(j, carry):
            acc, top, total = carry
            visible = visit.visible(j)
            scores = scores_of(q_tile, _load(keys, column_keys, visit, j), scale)
            scores = jnp.where(visible[..., None, :], scores, -jnp.inf)
            # Every row has seen its own key: its maximum is a number, and exp(-inf - maximum) is 0.
            new_top = jnp.maximum(top, scores.max(-1))
            weights, decay = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            step_values = only_visible(_load(values, column_values, visit, j), visible)
            acc = acc * decay[..., None] + weighted_sum(weights, step_values)
            return acc, new_top, total * decay + weights.sum(-1)

        acc, top, total = lax.fori_loop(0, visit.steps, step, carry)
        valid_row = q0 + jnp.arange(QUERY_TILE, dtype=jnp.int32) < limit[:, None, None]
        out = jnp.where(valid_row[..., None], acc / total[..., None], jnp.float32(0)).astype(q.dtype)
        return out, jnp.where(valid_row, top + jnp.log(total), jnp.float32(0))

    def head_group(head):
        _, keys, values, prepared, _ = head
        columns = None if prepared is None else prepared.columns  # gathered once here, read by every query tile
        column_rows = [None if columns is None else gather(x, columns) for x in (keys, values)]
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
