"""Dense attention as a pattern, for heads that need every key beside heads that do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minference_jax.patterns.base import MAX_BUDGET, Budgets, Colour, IndexRates, Pattern, Where, pairs
from pallas_kernels.plan import SparsePlan
from pallas_kernels.sizes import KEY_TILE, num_key_tiles


@dataclasses.dataclass(frozen=True)
class Dense(Pattern):
    """Causal attention to every earlier key."""

    name: ClassVar[str] = "dense"
    indexed: ClassVar[bool] = False
    dense: ClassVar[bool] = True

    @classmethod
    def budgets(cls, heads: Sequence[Sequence[Dense | None]]) -> Budgets:
        return _Everything()

    def visited(self, rows: int, keys: int, rates: IndexRates) -> float:
        return pairs(rows, keys, keys)

    def covers(self) -> int:
        return MAX_BUDGET

    def check_candidate(self) -> None:
        raise TypeError(f"{self!r} is no pattern with budgets")

    def colour(self) -> Colour:
        return (0.35, 0.35, 0.35)


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Everything(Budgets):
    def index(self, q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], where: Where) -> SparsePlan:
        # A window over everything, so that the head shares a launch with sparse ones.
        tiles = num_key_tiles(k.shape[1])
        lead = q.shape[0], q.shape[2]
        bands = jnp.broadcast_to(KEY_TILE * jnp.arange(1, tiles + 1, dtype=jnp.int32), (*lead, tiles))
        count = jnp.full(lead, min((k.shape[1] + KEY_TILE - 2) // KEY_TILE, tiles), jnp.int32)
        return SparsePlan(bands=bands, band_count=count, band_multiple=KEY_TILE, clean=True)
