"""A-shape: attention sinks and a sliding window."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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


@dataclasses.dataclass(frozen=True)
class AShape(Pattern):
    """The first keys of the prompt and the latest ones: attention sinks and a sliding window, as in StreamingLLM.

    The mask is fixed, so there is no index.

    **Fields** (both are clamped to the prompt's length):

    - `sink`: keys from the first on; 0 or more.
    - `window`: keys back from the query, its own included; 1 or more. It is rounded out to 64-key tiles.

    **Raises:** TypeError for a field that is no int, ValueError for one out of range.

    Source: MInference (arXiv 2407.02490) §3.2; `stream_llm` in the official pattern files.
    """

    name: ClassVar[str] = "a-shape"
    indexed: ClassVar[bool] = False
    official_name: ClassVar[str | None] = "stream_llm"

    sink: int = 1024
    window: int = 4096

    def __post_init__(self) -> None:
        check_budget("AShape", "sink", self.sink, 0)
        check_budget("AShape", "window", self.window, 1)

    @classmethod
    def budgets(cls, heads: Sequence[Sequence[AShape | None]]) -> Budgets:
        sink, window = (
            table(heads, lambda p, field=field: getattr(p, field), np.int32, 0) for field in ("sink", "window")
        )
        own = members(heads)
        return AShapeBudgets(sink, window, max(p.sink for p in own), max(p.window for p in own))

    def visited(self, rows: int, keys: int, rates: IndexRates) -> float:
        return pairs(rows, keys, self.sink + self.window + KEY_TILE)

    def covers(self) -> int:
        return max(self.sink, self.window)

    def index_bytes(self, rows: int, keys: int, heads: int, itemsize: int = 2) -> int:
        return 2 * heads * -(-rows // 128) * min(self.sink + 3 * KEY_TILE, keys)  # one bias row a query tile

    def scaled(self, factor: float, keys: int) -> AShape:
        return AShape(scaled_budget(self.sink, factor, keys), scaled_budget(self.window, factor, keys, least=1))

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        return (cls(64, 4096),)  # a window with a short sink

    def budget(self) -> float:
        return self.sink + self.window

    def label(self) -> str:
        return "A-shape"

    def colour(self) -> Colour:
        return (0.85, 0.37, 0.01)

    def official(self) -> tuple[int, int]:
        return self.sink, self.window

    @classmethod
    def from_official(cls, first: Any, second: Any) -> AShape:
        return cls(sink=first, window=second)


@partial(jax.tree_util.register_dataclass, data_fields=["sink", "window"], meta_fields=["sink_width", "window_width"])
@dataclasses.dataclass(frozen=True)
class AShapeBudgets(Budgets):
    """Keys of sink and window of each head, and the largest of both (static)."""

    sink: Int[Array, "*layers n"]
    window: Int[Array, "*layers n"]
    sink_width: int
    window_width: int

    def index(self, q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], where: Where) -> SparsePlan:
        s, lead = k.shape[1], (q.shape[0], q.shape[2])
        tiles, width = num_key_tiles(min(s, self.window_width)), min(s, self.sink_width)
        # The oldest key of a query tile's window is q0 − window + 1.
        band_count = jnp.broadcast_to(jnp.minimum((self.window + KEY_TILE - 2) // KEY_TILE, tiles), lead)
        bands = jnp.broadcast_to(KEY_TILE * jnp.arange(1, tiles + 1, dtype=jnp.int32), (*lead, tiles))
        columns = column_count = None
        if width:
            columns = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (*lead, width))
            column_count = jnp.broadcast_to(jnp.minimum(self.sink, s), lead)
        return SparsePlan(columns, column_count, bands, band_count, band_multiple=KEY_TILE, clean=True)

    def widest(self, keys: int) -> AShapeBudgets:
        return dataclasses.replace(self, sink_width=keys, window_width=keys)
