"""The few query rows ("probes") whose attention stands for the whole prompt, and their scores against the keys.

The original looks at the last 64 rows of one unpadded prompt. Here: the last 64 *valid* rows of each sequence, of the
chunk at hand; or most of them spread evenly over it, since heads differ along a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.plan import KEY_TILE, QUERY_TILE

PROBES = 64
"""Probe rows per head (`last_q` of the original)."""

SCORE_BYTES = 512 * 2**20
"""The most memory that probe scores may take at once. One KV head of a 1M-token prompt (four query heads, bfloat16)
takes just as much."""

LAST = 16
"""Of the probes that are spread over the prompt, so many are its last rows."""

LAST_IMPORTANCE = 0.3
"""The weight of each of the last rows where the other probes are spread over the prompt. Each of the others counts 1.

A last row stands for itself, a spread probe for many rows, so by proportion the last rows would hardly count. But what
the end of a prompt asks for is what the prompt is read for."""


def probe_rows(valid: Int[Array, " b"], spread: Bool[Array, " n"]) -> Int[Array, "b n p"]:
    """Row numbers of the probes, ascending; negative where a sequence has fewer valid rows than probes.

    **Arguments:** `valid`: int32 number of valid query rows of each sequence. `spread`: heads that want
    all but 16 of their probes spread over the rows; the others, and sequences of 64 rows or fewer, take the last 64.
    """
    i = jnp.arange(PROBES, dtype=jnp.int32)
    valid = valid[:, None, None]
    last = valid - PROBES + i
    # The middle of each of 48 equal parts; (2i + 1)(valid − 16) stays below 2³¹ up to 22 million rows.
    even = (2 * i + 1) * (valid - LAST) // (2 * (PROBES - LAST))
    return jnp.where(spread[:, None] & (valid > PROBES) & (i < PROBES - LAST), even, last)


def probe_importance(rows: Int[Array, "b n p"], spread: Bool[Array, " n"]) -> Float[Array, "b n p"]:
    """How much each probe counts: 0 where there is none; less for the last rows where others are spread."""
    i = jnp.arange(PROBES, dtype=jnp.int32)
    last = spread[:, None] & (rows[..., -1:] >= PROBES) & (i >= PROBES - LAST)
    return jnp.where(rows >= 0, jnp.where(last, LAST_IMPORTANCE, 1.0), 0.0)


def gather_probes(q: Float[Array, "b t n h"], rows: Int[Array, "b n p"]) -> Float[Array, "b n p h"]:
    """The probe rows of q; rows out of range give some row of q, to be masked by its position."""
    rows = jnp.clip(rows, 0, q.shape[1] - 1).swapaxes(1, 2)[..., None]
    return jnp.take_along_axis(q, rows, axis=1, mode="clip").swapaxes(1, 2)


def probe_scores(
    probes: Float[Array, "b k g p h"], k: Float[Array, "b s k h"], scale: float
) -> tuple[Float[Array, "b k g p s"], float]:
    """Unmasked scores in the input's dtype, as the original has them, and the factor that completes their scale.

    One matrix product per KV head serves its whole group of query heads. The power of two nearest to `scale` is
    taken into the queries, which is exact and keeps float16 in range; the rest of the scale is left to the softmax.
    """
    power = 2.0 ** round(math.log2(scale)) if scale > 0 else 1.0
    exact = jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
    probes = probes * jnp.asarray(power, probes.dtype)
    scores = jnp.einsum("bkgph,bskh->bkgps", probes, k, precision=exact, preferred_element_type=k.dtype)
    return scores, scale / power


def seen_tiles(
    flags: Bool[Array, "*heads r"], positions: Int[Array, "*heads p"], tiles: int
) -> Bool[Array, "*heads p tiles"]:
    """Which key tiles the diagonal and the bands (`flags[r // 64]`) show to the rows at `positions`."""
    tile = jnp.arange(tiles, dtype=jnp.int32)
    distance = (positions // QUERY_TILE * (QUERY_TILE // KEY_TILE))[..., None] - tile
    index = jnp.clip(distance, 0, flags.shape[-1] - 1).reshape(*flags.shape[:-1], -1)
    banded = jnp.take_along_axis(flags, index, axis=-1, mode="clip").reshape(distance.shape)
    return (distance <= 0) | banded


def by_kv_head(per_head: dict[str, Array], b: int, n: int, kv_heads: int) -> dict[str, Array]:
    """Arrays `[b, n, …]`, or `[n]` for every sequence alike, as `[b, k, g, …]`: the query heads of each KV head."""
    full = {name: x if x.ndim > 1 else jnp.broadcast_to(x, (b, n)) for name, x in per_head.items()}
    return {name: x.reshape(b, kv_heads, n // kv_heads, *x.shape[2:]) for name, x in full.items()}


def map_heads(
    function: Callable[..., Any],
    k: Float[Array, "b s k h"],
    per_head: Any,
    per_sequence: Any,
    *,
    bytes_per_kv_head: int,
) -> Any:
    """Calls `function(k, per_head, per_sequence)` for a few sequences and KV heads at a time; the results are joined.

    As many at a time as keep the scores within `SCORE_BYTES`: several whole sequences if all heads of one fit, else
    some KV heads of one sequence. Leaves of `per_head` start with the axes `[b, k]`, leaves of `per_sequence` with
    `[b]`. `function` gets slices with the same axes, and its results must start with `[b, k]`.
    """
    b, kv_heads = k.shape[0], k.shape[2]
    if b * kv_heads * bytes_per_kv_head <= SCORE_BYTES:
        return function(k, per_head, per_sequence)
    fitting = max(1, SCORE_BYTES // bytes_per_kv_head)
    at_once = _largest_divisor(kv_heads, fitting)
    rows = _largest_divisor(b, max(1, fitting // kv_heads))

    def one(index: Int[Array, ""]) -> Any:
        row, head = index // (kv_heads // at_once) * rows, index % (kv_heads // at_once) * at_once

        def take(x: Array, axis: int, size: int) -> Array:
            x = jax.lax.dynamic_slice_in_dim(x, row, rows, axis=0)
            return x if axis == 0 else jax.lax.dynamic_slice_in_dim(x, head, size, axis=axis)

        return function(
            take(k, 2, at_once),
            jax.tree.map(lambda x: take(x, 1, at_once), per_head),
            jax.tree.map(lambda x: take(x, 0, 1), per_sequence),
        )

    out = jax.lax.map(one, jnp.arange(b // rows * (kv_heads // at_once), dtype=jnp.int32))
    return jax.tree.map(lambda x: x.reshape(b, kv_heads, *x.shape[3:]), out)


def _largest_divisor(number: int, most: int) -> int:
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= most)
