"""Shared density: the heads of a layer compete for a share of its cells, found anew for each prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.index.shared_density import shared_density_index
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
from minference_jax.patterns.per_tile import PerTile, check_every, common_every
from pallas_kernels.plan import SparsePlan
from pallas_kernels.sizes import QUERY_TILE


@dataclasses.dataclass(frozen=True)
class SharedDensity(Pattern):
    """The columns and key tiles with the most attention in a layer, up to a share of its causal cells.

    A probe every few rows estimates the attention of each query tile. One threshold on the mean attention weight,
    found for each prompt, decides for all heads of the layer that are of this family: the smallest one at which they
    visit together no more than the sum of their shares. So heads compete, and every prompt has the density.

    **Fields:**

    - `density`: in (0, 1], visited / causal cells of the layer.
    - `every`: rows to a probe, a divisor of 128; the same in all heads of a model.
    - `question`: if given, so many keys are columns of every head in any case: those that the last 64 rows attend to
      most. The query tiles of these rows then visit every key. Both are part of the density.

    A prompt so short that the diagonal, the first keys and what the question asks for are more than the density visits
    just these. `minference_jax.search.share_among_layers` gives each layer a share of its own.

    Source: ours.
    """

    name: ClassVar[str] = "shared-density"

    density: float
    every: int = 16
    question: int | None = None

    def __post_init__(self) -> None:
        check_share("SharedDensity", "density", self.density)
        if self.density is None:
            raise TypeError("SharedDensity: density must be a number, got None")
        check_every("SharedDensity", self.every)
        if self.question is not None:
            check_budget("SharedDensity", "question", self.question, 0)

    @classmethod
    def budgets(cls, heads: Sequence[Sequence[SharedDensity | None]]) -> Budgets:
        own = members(heads)
        question = table(heads, lambda p: p.question, np.int32, 0) if any(p.question for p in own) else None
        density = table(heads, lambda p: p.density, np.float32, np.inf)
        return SharedDensityBudgets(density, question, common_every("SharedDensity", own))

    def visited(self, rows: int, keys: int, rates: IndexRates) -> float:
        every = pairs(rows, keys, keys)
        return self.density * every + rates.probe * every / self.every

    def index_bytes(self, rows: int, keys: int, heads: int, itemsize: int = 2) -> int:
        return 6 * heads * -(-rows // QUERY_TILE) * keys  # sums in float32 by query tile, and a bias for each column

    def scaled(self, factor: float, keys: int) -> SharedDensity:
        question = None if self.question is None else scaled_budget(self.question, factor, keys)
        return dataclasses.replace(self, density=min(self.density * factor, 1.0), question=question)

    def check_candidate(self) -> None:
        raise ValueError(f"{self!r}: a density is shared by a layer's heads; each is searched alone")

    def share(self) -> float:
        return self.density

    def with_share(self, share: float) -> SharedDensity:
        return dataclasses.replace(self, density=share)

    def at_threshold(self, threshold: float) -> PerTile:
        return PerTile(self.every, threshold)

    def label(self) -> str:
        return "shared density"

    def colour(self) -> Colour:
        return (0.91, 0.16, 0.54)


@partial(jax.tree_util.register_dataclass, data_fields=["density", "question"], meta_fields=["every"])
@dataclasses.dataclass(frozen=True)
class SharedDensityBudgets(Budgets):
    """Density of each head (inf for a head of another family), its question columns (None where no head has any), and
    rows to a probe (static). A part of a prompt has the same density and question columns as the whole."""

    density: Float[Array, "*layers n"]
    question: Int[Array, "*layers n"] | None
    every: int

    def index(self, q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], where: Where) -> SparsePlan:
        options: dict[str, Any] = {"lengths": where.lengths, "q_offset": where.q_offset, "scale": where.scale}
        return shared_density_index(q, k, self.density, self.question, every=self.every, **options)
