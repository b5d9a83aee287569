"""Block-sparse: the most promising key tiles of each query tile, by mean-pooled queries and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.index.block_sparse import SCORE_BYTES, block_sparse_index
from minference_jax.patterns.base import (
    Budgets,
    Colour,
    IndexRates,
    Pattern,
    Where,
    check_budget,
    members,
    pairs,
    scaled_budget,
    table,
)
from pallas_kernels.plan import SparsePlan
from pallas_kernels.sizes import KEY_TILE, num_key_tiles

OFFICIAL_BLOCKS = 100
"""Hard-coded in the original, whatever its files say."""


@dataclasses.dataclass(frozen=True)
class BlockSparse(Pattern):
    """For each tile of 128 queries, the 64-key tiles that look most promising.

    The index pools: the mean of a tile's queries scores the mean of each key tile. It suits heads whose attention comes
    in clusters; a single key that matters is lost in its tile's mean.

    **Fields:** `blocks`: key tiles for each query tile, at least 1. The two tiles of the diagonal and the first tile of
    the prompt are always among them.

    **Raises:** TypeError for a number of blocks that is no int, ValueError for one below 1.

    Source: MInference (arXiv 2407.02490) §3.2, Algorithm 3 (which uses 64-query tiles).
    """

    name: ClassVar[str] = "block-sparse"
    official_name: ClassVar[str | None] = "block_sparse"

    blocks: int = 100

    def __post_init__(self) -> None:
        check_budget("BlockSparse", "blocks", self.blocks, 1)

    @classmethod
    def budgets(cls, heads: Sequence[Sequence[BlockSparse | None]]) -> Budgets:
        width = max(p.blocks for p in members(heads))
        return BlockSparseBudgets(table(heads, lambda p: p.blocks, np.int32, 0), width)

    def visited(self, rows: int, keys: int, rates: IndexRates) -> float:
        return pairs(rows, keys, KEY_TILE * self.blocks)

    def covers(self) -> int:
        return KEY_TILE * self.blocks

    def index_bytes(self, rows: int, keys: int, heads: int, itemsize: int = 2) -> int:
        lists = 4 * heads * -(-rows // 128) * min(self.blocks, num_key_tiles(keys))
        return lists + min(SCORE_BYTES, itemsize * heads * -(-rows // 128) * num_key_tiles(keys))

    def scaled(self, factor: float, keys: int) -> BlockSparse:
        return BlockSparse(scaled_budget(self.blocks, factor, num_key_tiles(keys), least=1))

    def budget(self) -> float:
        return KEY_TILE * self.blocks

    def colour(self) -> Colour:
        return (0.58, 0.27, 0.65)

    def official(self) -> tuple[int, int] | None:
        return (self.blocks, 0) if self.blocks == OFFICIAL_BLOCKS else None

    @classmethod
    def from_official(cls, first: Any, second: Any) -> BlockSparse:
        return cls(OFFICIAL_BLOCKS)


@partial(jax.tree_util.register_dataclass, data_fields=["blocks"], meta_fields=["width"])
@dataclasses.dataclass(frozen=True)
class BlockSparseBudgets(Budgets):
    """Key tiles per query tile of each head, the diagonal's two included, and the largest of them (static)."""

    blocks: Int[Array, "*layers n"]
    width: int

    def index(self, q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], where: Where) -> SparsePlan:
        blocks, count = block_sparse_index(
            q, k, self.blocks, self.width, lengths=where.lengths, q_offset=where.q_offset
        )
        return SparsePlan(blocks=blocks, block_count=count, clean=True)

    def widest(self, keys: int) -> BlockSparseBudgets:
        return dataclasses.replace(self, width=num_key_tiles(keys))
