"""Antidiagonal: key tiles by their antidiagonal sums (XAttention)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.index.antidiagonal import antidiagonal_index
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

STRIDES = (4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Antidiagonal(Pattern):
    """For each query tile, the fewest key tiles that hold a share of the estimated attention.

    The estimate sees every query and every key once: it cuts queries and keys into cells of `stride` by `stride`, and
    scores the antidiagonal of each cell. The diagonal and the first tile are always taken.

    **Fields:**

    - `blocks`: most tiles before the diagonal that a query tile may take; at least 1.
    - `coverage`: in (0, 1], the share of the estimated mass to hold; the original calls it threshold.
    - `stride`: 4, 8, 16 or 32, the same in all heads of a model. The estimate costs 1 / `stride` of dense scores.

    **Raises:** TypeError and ValueError that name the field.

    Source: XAttention (arXiv 2503.16428) §2. Its tiles are 128 by 128; here 128 queries by 64 keys.
    """

    name: ClassVar[str] = "antidiagonal"

    blocks: int = 256
    coverage: float = 0.9
    stride: int = 8

    def __post_init__(self) -> None:
        check_budget("Antidiagonal", "blocks", self.blocks, 1)
        check_share("Antidiagonal", "coverage", self.coverage)
        if self.stride not in STRIDES:
            raise ValueError(f"Antidiagonal: stride must be 4, 8, 16 or 32, got {self.stride}")

    @classmethod
    def budgets(cls, heads: Sequence[Sequence[Antidiagonal | None]]) -> Budgets:
        own = members(heads)
        strides = sorted({p.stride for p in own})
        if len(strides) > 1:
            raise ValueError(f"Antidiagonal: the heads of a model must agree on stride, got {strides}")
        blocks = table(heads, lambda p: p.blocks, np.int32, 1)
        coverage = table(heads, lambda p: p.coverage, np.float32, 1.0)
        return AntidiagonalBudgets(blocks, coverage, strides[0], max(p.blocks for p in own))

    def visited(self, rows: int, keys: int, rates: IndexRates) -> float:
        every = pairs(rows, keys, keys)
        return min(pairs(rows, keys, KEY_TILE * self.blocks), every) + rates.probe * every / self.stride**2

    def index_bytes(self, rows: int, keys: int, heads: int, itemsize: int = 2) -> int:
        scores = 4 * heads * (128 // self.stride) * (keys // self.stride)  # of one query tile, in float32
        return scores + 4 * heads * -(-rows // 128) * min(self.blocks, num_key_tiles(keys))

    def scaled(self, factor: float, keys: int) -> Antidiagonal:
        blocks = scaled_budget(self.blocks, factor, num_key_tiles(keys), least=1)
        return dataclasses.replace(self, blocks=blocks)

    def check_candidate(self) -> None:
        if self.coverage < 1:
            raise ValueError(f"{self!r}: with a coverage below 1 the cost is not the budgets'")

    def budget(self) -> float:
        return KEY_TILE * self.blocks

    def colour(self) -> Colour:
        return (0.40, 0.65, 0.12)


@partial(jax.tree_util.register_dataclass, data_fields=["blocks", "coverage"], meta_fields=["stride", "width"])
@dataclasses.dataclass(frozen=True)
class AntidiagonalBudgets(Budgets):
    """Tiles and coverage of each head; the stride and the largest number of tiles (static)."""

    blocks: Int[Array, "*layers n"]
    coverage: Float[Array, "*layers n"]
    stride: int
    width: int

    def index(self, q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], where: Where) -> SparsePlan:
        return antidiagonal_index(
            *(q, k, self.blocks, self.coverage), stride=self.stride, width=self.width, **where.keywords()
        )

    def widest(self, keys: int) -> AntidiagonalBudgets:
        return dataclasses.replace(self, width=num_key_tiles(keys))
