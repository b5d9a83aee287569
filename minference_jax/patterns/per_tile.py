"""Per tile: a probe every few rows, and whatever is worth a visit by a threshold on the mean attention weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.index.per_tile import per_tile_index
from minference_jax.index.probes import SCORE_BYTES
from minference_jax.index.tiles import tile_budget
from minference_jax.patterns.base import (
    Budgets,
    Colour,
    IndexRates,
    Pattern,
    Where,
    check_budget,
    check_share,
    members,
    pairs,
    part_of,
    scaled_budget,
    table,
)
from pallas_kernels.plan import SparsePlan
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE


@dataclasses.dataclass(frozen=True)
class PerTile(Pattern):
    """Every column and every key tile whose mean attention weight reaches a threshold.

    A *probe* is a query row whose attention is computed in full; there is one every few rows. From the probes the index
    estimates two means: over the rows of one query tile, for each key tile; and over all rows, for each key. A key tile
    is visited by a query tile, or a key by all later queries as a column, if its mean weight is at least `threshold`.

    How many keys that makes depends on the prompt. It is for prompts of some thousand tokens: the estimate costs 1 /
    `every` of dense attention's scores, and memory that grows with the square of the length.

    **Fields:**

    - `every`: rows to a probe, a divisor of 128; the same in all heads of a model.
    - `threshold`: in (0, 1). About 0.7 / N visits a quarter of the cells of an N-token text.
    - `floor_columns`, `floor_slashes`: what a head keeps at least. A head that would hold less of the softmax mass than
      `VerticalSlash(floor_columns, floor_slashes)` gets a lower threshold of its own. (It is compared with other splits
      of about the same cost too: more slashes, fewer columns.) 0 and 0 leave next to no floor.

    **Raises:** TypeError and ValueError that name the field.

    Source: ours.
    """

    name: ClassVar[str] = "per-tile"

    every: int
    threshold: float
    floor_columns: int = 0
    floor_slashes: int = 0

    def __post_init__(self) -> None:
        check_every("PerTile", self.every)
        check_share("PerTile", "threshold", self.threshold, one=False)
        if self.threshold is None:
            raise TypeError("PerTile: threshold must be a number, got None")
        check_budget("PerTile", "floor_columns", self.floor_columns, 0)
        check_budget("PerTile", "floor_slashes", self.floor_slashes, 0)

    @classmethod
    def budgets(cls, heads: Sequence[Sequence[PerTile | None]]) -> Budgets:
        own = members(heads)
        return PerTileBudgets(
            table(heads, lambda p: p.floor_columns, np.int32, 0),
            table(heads, lambda p: p.floor_slashes, np.int32, 0),
            table(heads, lambda p: p.threshold, np.float32, np.inf),
            common_every("PerTile", own),
            max(p.floor_slashes for p in own),
        )

    def visited(self, rows: int, keys: int, rates: IndexRates) -> float:
        every = pairs(rows, keys, keys)
        floor = self.floor_columns + KEY_TILE * (tile_budget(self.floor_slashes) + 2)
        chosen = pairs(rows, keys, (1 - 0.5 * rows / keys) * floor)
        return chosen + rates.probe * every / self.every

    def index_bytes(self, rows: int, keys: int, heads: int, itemsize: int = 2) -> int:
        tiles = -(-rows // QUERY_TILE)
        sums = keys * (itemsize * (rows // self.every) + 12 * tiles)  # of one head: scores, and sums by query tile
        return min(SCORE_BYTES, heads * sums) + 2 * heads * tiles * keys

    def scaled(self, factor: float, keys: int) -> PerTile:
        return PerTile(
            self.every,
            min(self.threshold / factor, 0.9),
            scaled_budget(self.floor_columns, factor, keys),
            scaled_budget(self.floor_slashes, factor, keys),
        )

    def budget(self) -> float:
        return self.floor_columns + self.floor_slashes

    def label(self) -> str:
        return "per tile, threshold"

    def colour(self) -> Colour:
        return (0.65, 0.46, 0.11)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["columns", "slashes", "threshold"],
    meta_fields=["every", "floor"],
)
@dataclasses.dataclass(frozen=True)
class PerTileBudgets(Budgets):
    """Floor and threshold of each head; rows to a probe and the largest number of slashes (static)."""

    columns: Int[Array, "*layers n"]
    slashes: Int[Array, "*layers n"]
    threshold: Float[Array, "*layers n"]
    every: int
    floor: int

    def index(self, q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], where: Where) -> SparsePlan:
        arrays = {"columns": self.columns, "slashes": self.slashes, "threshold": self.threshold}
        return per_tile_index(q, k, arrays, every=self.every, floor=self.floor, **where.keywords())

    def for_part(self, share: Float[Array, "b 1"]) -> PerTileBudgets:
        return dataclasses.replace(self, columns=part_of(self.columns, share), slashes=part_of(self.slashes, share))

    def widest(self, keys: int) -> PerTileBudgets:
        return dataclasses.replace(self, floor=keys if self.floor else 0)


def check_every(owner: str, every: object) -> None:
    """Raises TypeError or ValueError unless `every` is a divisor of 128."""
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"{owner}: every must be an int, got {every!r}")
    if not 1 <= every <= QUERY_TILE or QUERY_TILE % every:
        raise ValueError(f"{owner}: every must be a divisor of {QUERY_TILE}, got {every}")


def common_every(owner: str, heads: Sequence[Any]) -> int:
    """The `every` of all heads. Raises ValueError where they differ: their probes are the same rows."""
    found = sorted({p.every for p in heads})
    if len(found) > 1:
        raise ValueError(f"{owner}: the heads of a model must agree on every, got {found}")
    return found[0]
