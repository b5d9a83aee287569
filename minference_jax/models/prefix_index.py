"""The index of one part of a prompt, from as much of the cache as that part can see.

A cache has room for the whole prompt, and an index reads all keys it is given, so eight parts would pay for eight whole
prompts. Here one of a few static extents of the cache is read, the smallest that reaches the part's end.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.index.build import make_plan
from minference_jax.patterns import DENSE, PatternArrays, PlanBuilder
from pallas_kernels.plan import QUERY_TILE, SparsePlan

EXTENTS = 4
"""Prefixes of the cache that an index can be made of: its quarters. Each is compiled, at a few seconds."""


@partial(jax.tree_util.register_dataclass, data_fields=["patterns"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PrefixIndex(PlanBuilder):
    """The plan that `patterns` would make, from the keys up to a part's end (rounded up to a quarter of the cache)."""

    patterns: PatternArrays

    def build(
        self,
        q: Float[Array, "b t n h"],
        k: Float[Array, "b s k h"],
        *,
        lengths: Int[Array, " b"],
        q_offset: Int[Array, ""],
        scale: float,
    ) -> SparsePlan:
        """See `PlanBuilder.build`."""
        t, s = q.shape[1], k.shape[1]
        quarter = -(-s // (EXTENTS * QUERY_TILE)) * QUERY_TILE
        extents = sorted({min(s, max(t, i * quarter)) for i in range(1, EXTENTS + 1)})

        def plan(extent: int) -> SparsePlan:
            where = {"lengths": jnp.minimum(lengths, extent), "q_offset": q_offset, "scale": scale}
            return make_plan(q, k[:, :extent], self.patterns, **where)

        full = jax.eval_shape(lambda: plan(s))
        which = sum((q_offset + t > extent).astype(jnp.int32) for extent in extents[:-1])
        branches = [partial(lambda extent: _padded(plan(extent), full), extent) for extent in extents]
        return jax.lax.switch(jnp.asarray(which, jnp.int32), branches)


def for_part(patterns: Any, rows: int, capacity: int) -> Any:
    """`patterns` for a part of `rows` against a cache of `capacity`: with a `PrefixIndex` where that saves work."""
    if not isinstance(patterns, PatternArrays) or DENSE in patterns.limits.kinds:
        return patterns
    return patterns if patterns.limits.covers >= capacity or 2 * rows > capacity else PrefixIndex(patterns)


def _padded(plan: SparsePlan, full: Any) -> SparsePlan:
    """The plan at the widths of `full`; entries past the counts are ignored."""

    def pad(x: Array, wide: Any) -> Array:
        return jnp.pad(x, [(0, there - here) for here, there in zip(x.shape, wide.shape, strict=True)])

    return jax.tree.map(pad, plan, full)
