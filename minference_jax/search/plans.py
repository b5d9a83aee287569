"""A candidate's plan for a sample, reduced to what the search needs: its density, and masks of a few query tiles."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from minference_jax.attention import make_plan
from minference_jax.index import select
from minference_jax.index.recall import column_flags
from minference_jax.patterns import LayerPatterns
from pallas_kernels.plan import num_query_tiles, visited_keys


class PlanMasks(NamedTuple):
    """What a plan visits.

    - `density`: float32 `[b, n]`, visited / causal cells, over all rows.
    - `keys`: uint32 `[b, n, i, w]`, bitmaps (as in `index.select`) of the keys that the i scored query tiles visit.
    """

    density: Float[Array, "b n"]
    keys: UInt32[Array, "b n i w"]


def scored_tiles(tokens: int, count: int) -> np.ndarray:
    """int32 numbers of `count` query tiles spread evenly over `tokens` rows (all of them, if there are no more)."""
    total = num_query_tiles(tokens)
    if count >= total:
        return np.arange(total, dtype=np.int32)
    # The middle of each of `count` equal parts.
    return ((2 * np.arange(count) + 1) * total // (2 * count)).astype(np.int32)


@partial(jax.jit, static_argnames="scale")
def plan_masks(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    heads: LayerPatterns,
    lengths: Int[Array, " b"],
    query_tiles: Int[Array, " i"],
    scale: float | None = None,
) -> PlanMasks:
    """The plan that the index makes for these queries and keys, reduced to its density and to bitmaps of a few query
    tiles.

    **Arguments:** `q`: `[b, t, n, h]`; `k`: `[b, t, k, h]`. `heads`: one layer's patterns. `lengths`: int32 `[b]`.
    `query_tiles`: int32 `[i]`, the numbers of the tiles whose keys are wanted. `scale` (static): by default 1/sqrt(h).

    Memory: b·n·t·(1 + i/8) bytes, and what the index takes.
    """
    b, t, n, _ = q.shape
    plan = make_plan(q, k, heads, lengths=lengths, scale=scale)
    columns = column_flags(plan, t, (b, n))

    def one(i: Int[Array, ""]) -> UInt32[Array, "b n w"]:
        return select.pack(columns | visited_keys(plan, i, t, jnp.int32(0), (b, n)))

    keys = jnp.moveaxis(jax.lax.map(one, query_tiles), 0, 2)
    return PlanMasks(plan.density(t, t, lengths=lengths), keys)
