"""Query-aware: blocks for heads that follow their queries, columns and slashes for the others (FlexPrefill)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.index.probes import PROBES, SCORE_BYTES
from minference_jax.index.query_aware import query_aware_index
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
    scaled_budget,
    table,
)
from pallas_kernels.plan import SparsePlan
from pallas_kernels.sizes import KEY_TILE, num_key_tiles

BUDGETS = ("blocks", "columns", "tiles")


@dataclasses.dataclass(frozen=True)
class QueryAware(Pattern):
    """Blocks for heads whose attention a cheap estimate gets right, columns and slashes for the others.

    Each prompt decides anew, head by head. The index computes the attention of the last 128 rows in full, as a
    distribution over key tiles, and compares it with what mean-pooled queries and keys make of these rows. Where the
    two are near, the head gets blocks chosen by the pooled estimate; elsewhere columns and slashes, as `VerticalSlash`
    has them.

    **Fields:**

    - `blocks`, `columns`, `tiles`: the most that a query tile, or a head, may take; at least 1.
    - `coverage`: in (0, 1], the share of the estimated mass to hold; γ of the original.
    - `divergence`: at least 0; the largest difference for which a head gets blocks, τ of the original. It is the square
      root of the Jensen-Shannon divergence in natural logarithms, which is at most 0.83.

    **Raises:** TypeError and ValueError that name the field.

    Source: FlexPrefill (arXiv 2502.20766) §3, Algorithms 1 to 4.
    """

    name: ClassVar[str] = "query-aware"

    blocks: int = 256
    columns: int = 1000
    tiles: int = 128
    coverage: float = 0.9
    divergence: float = 0.1

    def __post_init__(self) -> None:
        for name in BUDGETS:
            check_budget("QueryAware", name, getattr(self, name), 1)
        check_share("QueryAware", "coverage", self.coverage)
        if not 0 <= self.divergence < float("inf"):
            raise ValueError(f"QueryAware: divergence must not be negative, got {self.divergence}")

    @classmethod
    def budgets(cls, heads: Sequence[Sequence[QueryAware | None]]) -> Budgets:
        own = members(heads)
        whole = {name: table(heads, lambda p, name=name: getattr(p, name), np.int32, 1) for name in BUDGETS}
        shares = {
            name: table(heads, lambda p, name=name: getattr(p, name), np.float32, 1.0)
            for name in ("coverage", "divergence")
        }
        return QueryAwareBudgets(**whole, **shares, widths=tuple(max(getattr(p, x) for p in own) for x in BUDGETS))

    def visited(self, rows: int, keys: int, rates: IndexRates) -> float:
        budget = max(KEY_TILE * self.blocks, self.columns + KEY_TILE * self.tiles)
        return pairs(rows, keys, (1 - 0.5 * rows / keys) * budget)

    def index_bytes(self, rows: int, keys: int, heads: int, itemsize: int = 2) -> int:
        lists = -(-rows // 128) * (4 * min(self.blocks, num_key_tiles(keys)) + 2 * min(self.columns, keys))
        return heads * lists + min(SCORE_BYTES, heads * PROBES * keys * itemsize)

    def scaled(self, factor: float, keys: int) -> QueryAware:
        tiles = num_key_tiles(keys)
        most = {"blocks": tiles, "columns": keys, "tiles": tiles}
        changed: dict[str, Any] = {
            name: scaled_budget(getattr(self, name), factor, most[name], least=1) for name in BUDGETS
        }
        return dataclasses.replace(self, **changed)

    def check_candidate(self) -> None:
        raise ValueError(f"{self!r}: with a coverage the cost is not the budgets'")

    def budget(self) -> float:
        return KEY_TILE * self.blocks

    def colour(self) -> Colour:
        return (0.90, 0.67, 0.01)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks", "columns", "tiles", "coverage", "divergence"],
    meta_fields=["widths"],
)
@dataclasses.dataclass(frozen=True)
class QueryAwareBudgets(Budgets):
    """Budgets of each head, and the largest blocks, columns and tiles (static)."""

    blocks: Int[Array, "*layers n"]
    columns: Int[Array, "*layers n"]
    tiles: Int[Array, "*layers n"]
    coverage: Float[Array, "*layers n"]
    divergence: Float[Array, "*layers n"]
    widths: tuple[int, ...]

    def index(self, q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], where: Where) -> SparsePlan:
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "widths"}
        widths = dict(zip(BUDGETS, self.widths, strict=True))
        return query_aware_index(q, k, arrays, **widths, **where.keywords())

    def widest(self, keys: int) -> QueryAwareBudgets:
        return dataclasses.replace(self, widths=(num_key_tiles(keys), keys, num_key_tiles(keys)))
