"""Shared density: the heads of a layer compete for a share of its cells, found anew for each prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
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
from pallas_kernels.sizes import QUERY_TILE, num_key_tiles

LEAST_MASS = 0.12
"""Of a row's attention: what all cells of a density hold together, were they as light as the lightest tile taken.

With less, layers visit more alike: replies are nearer to dense attention's, text is predicted a little worse. qwen2
.5B at a density of .20 and 16K tokens: .16 costs no perplexity, .12 .6 %, .08 and 0 1.3 and 1.4 %. Of the
log-probability of dense attention's replies .16 loses .56, of which .12 regains .10 ± .03; at 32K .32 ± .06 of 2.0 (an
H200; notebooks/quality.md).
"""

_BY_DENSITY = -1.0


@dataclasses.dataclass(frozen=True)
class SharedDensity(Pattern):
    """The key tiles with the most attention in a layer, up to a share of the layer's causal cells.

    A *probe* is a query row whose attention is computed in full; every query tile has some. They say how much of their
    attention each key tile holds. The heads of a layer compete for one budget: tiles are taken by their mean attention
    weight, the highest first, whatever head they are of, until the layer has used up its cells. So a head that needs
    more gets more.

    On Hopper GPUs probes are multiplied with the keys in FP8 where these are bfloat16, of up to 128 dimensions, and a
    head has at least 2,048 probes (16K tokens at a probe in 8 rows), unless a question has its columns. One in fifty or
    fewer of the tiles then chosen are others (a qwen2 model, 8K tokens, .20).

    Always visited, and counted in the density: the diagonal, the first key tile, every key for the query tiles that
    hold the last 64 rows, and the question's columns. In an N-token prompt these are about 512 / N of the cells; where
    that is more than the density, they are all that is visited.

    **Fields:**

    - `density`: in (0, 1], visited / causal cells of the layer. About .25 at 8K tokens, .20 at 16K, .12 at 32K, .08 at
      64K and .045 at 128K, as `"auto"` has it; more where answers need it.
    - `every`: rows to a probe, a divisor of 128; the same in all heads of a model. The index costs 1 / `every` of dense
      attention's scores.
    - `question`: if given, so many keys are columns of every head: those that the last 64 rows attend to most.
    - `threshold`: in [0, 1): tiles of a lower mean attention weight are left out, though the density would allow them.
      By default .12 / (density · N) for N tokens: what is left out are tiles so light that, were all of the density's
      cells like them, a row would hold .12 of its attention. 0 spends the density whatever the tiles weigh.

    A prompt that needs less visits less. In a model, a layer leaves what it does not need to the layers after it, some
    of which need two or three times as much as others: the density bounds the mean of the layers so far.

    `minference_jax.search.share_among_layers` gives each layer a share of its own.

    **Raises:** TypeError and ValueError that name the field.

    Source: ours.
    """

    name: ClassVar[str] = "shared-density"
    copies_keys: ClassVar[bool] = True

    density: float
    every: int = 16
    question: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_share("SharedDensity", "density", self.density)
        if self.density is None:
            raise TypeError("SharedDensity: density must be a number, got None")
        check_every("SharedDensity", self.every)
        if self.question is not None:
            check_budget("SharedDensity", "question", self.question, 0)
        if isinstance(self.threshold, bool) or self.threshold != 0:
            check_share("SharedDensity", "threshold", self.threshold, one=False)

    @classmethod
    def budgets(cls, heads: Sequence[Sequence[SharedDensity | None]]) -> Budgets:
        own = members(heads)
        widest = max(p.question or 0 for p in own)
        return SharedDensityBudgets(
            density=table(heads, lambda p: p.density, np.float32, np.inf),
            question=table(heads, lambda p: p.question, np.int32, 0) if widest else None,
            threshold=table(heads, lambda p: _BY_DENSITY if p.threshold is None else p.threshold, np.float32, 0.0),
            every=common_every("SharedDensity", own),
            question_width=widest,
        )

    def visited(self, rows: int, keys: int, rates: IndexRates) -> float:
        every = pairs(rows, keys, keys)
        return self.density * every + rates.mass * every / self.every

    def index_seconds(self, keys: int, heads: int, rates: IndexRates) -> float:
        return rates.selection

    def index_bytes(self, rows: int, keys: int, heads: int, itemsize: int = 2) -> int:
        tiles = heads * -(-rows // QUERY_TILE) * num_key_tiles(keys)
        probes = QUERY_TILE // self.every
        # What the probes hold of every key tile in float32, and of every eighth; its 16-bit form and the lists.
        return tiles * (4 * probes + (probes + 1) // 2 + 4 + 2 + 4) + 2 * heads * -(-rows // QUERY_TILE) * (
            min(self.question or 0, keys) + 3 * 64
        )

    def scaled(self, factor: float, keys: int) -> SharedDensity:
        question = None if self.question is None else scaled_budget(self.question, factor, keys)
        return dataclasses.replace(self, density=min(self.density * factor, 1.0), question=question)

    def check_candidate(self) -> None:
        raise ValueError(f"{self!r}: a density is shared by a layer's heads; each is searched alone")

    def share(self) -> float:
        return self.density

    def with_share(self, share: float) -> SharedDensity:
        # A share that was found for a layer is spent there: a threshold would leave it to others.
        return dataclasses.replace(self, density=share, threshold=self.threshold or 0)

    def at_threshold(self, threshold: float) -> PerTile:
        return PerTile(self.every, threshold)

    def label(self) -> str:
        return "shared density"

    def colour(self) -> Colour:
        return (0.91, 0.16, 0.54)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["density", "question", "threshold"],
    meta_fields=["every", "question_width"],
)
@dataclasses.dataclass(frozen=True)
class SharedDensityBudgets(Budgets):
    """Density of each head (inf for a head of another family), its question columns (None where no head has any) and
    its threshold (negative: by the density); rows to a probe and the largest number of question columns (static). A
    part of a prompt has the same density and question columns as the whole."""

    density: Float[Array, "*layers n"]
    question: Int[Array, "*layers n"] | None
    threshold: Float[Array, "*layers n"]
    every: int
    question_width: int

    def shares(self) -> Float[Array, "*layers n"] | None:
        return self.density

    def index(self, q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], where: Where) -> SparsePlan:
        keys = jnp.maximum(where.lengths, 1).astype(jnp.float32)
        by_density = LEAST_MASS / (self.density * keys[:, None])
        threshold = jnp.where(self.threshold < 0, by_density, self.threshold)
        return shared_density_index(
            *(q, k, self.density, self.question, threshold),
            every=self.every,
            question_width=self.question_width,
            axis_name=where.axis_name,
            unspent=where.unspent,
            **where.keywords(),
        )

    def widest(self, keys: int) -> SharedDensityBudgets:
        return dataclasses.replace(self, question_width=keys if self.question_width else 0)
