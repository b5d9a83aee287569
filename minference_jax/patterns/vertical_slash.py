"""Vertical-slash: a few key columns that every query sees, and a few diagonals, found anew for each prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minference_jax.index.probes import PROBES, SCORE_BYTES
from minference_jax.index.tiles import tile_budget
from minference_jax.index.vertical_slash import GROWTH, Widths, vertical_slash_index
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
from pallas_kernels.sizes import KEY_TILE, num_key_tiles


@dataclasses.dataclass(frozen=True)
class VerticalSlash(Pattern):
    """A few key columns that every later query sees, and a few diagonals at fixed distances, found anew for each
    prompt.

    The index looks at 64 probe rows: query rows whose attention it computes in full. A column is worth the attention
    that the probes pay to its key; a diagonal is worth what they pay at its distance. Each head takes the best of both.

    **Fields** (budgets are clamped to the prompt's length):

    - `columns`: key positions ("vertical lines").
    - `slashes`: distances between query and key ("slash lines"), as the original counts them. Not used if `tiles` is
      given.
    - `tiles`: 64-key tiles at fixed distances before each 128-query tile, in place of `slashes`. A kernel visits whole
      tiles, so the cost of this budget does not depend on the prompt. It holds more softmax mass at the same cost.
    - `probes`: `"last"` looks at the last 64 rows, as the original does. `"spread"` looks at the last 16 rows and at 48
      spread evenly over the prompt, for attention that changes along the prompt.
    - `coverage`: if given, in (0, 1]: each head keeps only its best entries, as many as hold this share of the
      estimated softmax mass. The budgets stay upper limits.
    - `threshold`: if given (with `tiles`), in (0, 1): a head whose attention is spread wide may take more than its
      budget, up to `GROWTH` times. It takes all tiles and columns whose keys have at least this mean attention weight.
      About 1 / (2 · prompt length) is a start; half of it visits more.

    The defaults are the original's rule and its most frequent budget. For an N-token prompt,
    `VerticalSlash(columns=N // 20, tiles=N // 1024, probes="spread", threshold=0.5 / N)` holds most of the mass at a
    quarter of the cells; see `minference_jax.bench.recall`.

    **Raises:** TypeError and ValueError that name the field.

    Source: MInference (arXiv 2407.02490) §3.2, Algorithm 2. `tiles`, `"spread"`, `coverage` and `threshold` are ours.
    """

    name: ClassVar[str] = "vertical-slash"
    official_name: ClassVar[str | None] = "vertical_and_slash"

    columns: int = 1000
    slashes: int = 6096
    tiles: int | None = None
    probes: Literal["last", "spread"] = "last"
    coverage: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("columns", "slashes", "tiles"):
            if name != "tiles" or self.tiles is not None:
                check_budget("VerticalSlash", name, getattr(self, name), 0)
        if self.probes not in ("last", "spread"):
            raise ValueError(
                f"VerticalSlash: probes must be 'last' or 'spread', got {self.probes!r} (a probe every few rows: "
                "PerTile or SharedDensity)"
            )
        check_share("VerticalSlash", "coverage", self.coverage)
        check_share("VerticalSlash", "threshold", self.threshold, one=False)
        if self.threshold is not None and self.tiles is None:
            raise ValueError("VerticalSlash: threshold needs tiles; lines have no mean weight to compare")

    @classmethod
    def budgets(cls, heads: Sequence[Sequence[VerticalSlash | None]]) -> Budgets:
        own = members(heads)
        lines = [p for p in own if p.tiles is None]

        def grown(p: VerticalSlash) -> int:
            return 1 if p.threshold is None else GROWTH

        widths = Widths(
            columns=max(grown(p) * p.columns for p in own),
            slashes=max((p.slashes for p in lines), default=0),
            tiles=max((grown(p) * p.tiles for p in own if p.tiles is not None), default=0),
            lines=bool(lines),
            spread=any(p.probes == "spread" for p in own),
            coverage=any(p.coverage is not None for p in own),
            threshold=any(p.threshold is not None for p in own),
        )
        return VerticalSlashBudgets(
            table(heads, lambda p: p.columns, np.int32, 0),
            table(heads, lambda p: p.slashes, np.int32, 0),
            table(heads, lambda p: p.tiles, np.int32, -1),
            table(heads, lambda p: p.probes == "spread", bool, False),
            table(heads, lambda p: p.coverage, np.float32, np.inf),
            table(heads, lambda p: p.threshold, np.float32, np.inf),
            widths,
        )

    def visited(self, rows: int, keys: int, rates: IndexRates) -> float:
        # Of a prompt in one call half is counted: rows before a column, or nearer to the start than a band's distance,
        # do not visit it.
        return pairs(rows, keys, (1 - 0.5 * rows / keys) * (self.columns + KEY_TILE * (self._tiles() + 2)))

    def covers(self) -> int:
        if self.coverage is not None:
            return 0
        return max(self.columns, self.slashes) if self.tiles is None else KEY_TILE * self.tiles

    def index_bytes(self, rows: int, keys: int, heads: int, itemsize: int = 2) -> int:
        grown = 1 if self.threshold is None else GROWTH
        columns = min(grown * self.columns + 3 * KEY_TILE, keys)
        gathered = 2 * heads * columns * 128 * itemsize  # keys and values of the columns, for head_dim 128
        return min(SCORE_BYTES, heads * PROBES * keys * itemsize) + 2 * heads * -(-rows // 128) * columns + gathered

    def scaled(self, factor: float, keys: int) -> VerticalSlash:
        changed: dict[str, Any] = {"columns": scaled_budget(self.columns, factor, keys)}
        if self.tiles is None:
            changed["slashes"] = scaled_budget(self.slashes, factor, keys)
        else:
            changed["tiles"] = scaled_budget(self.tiles, factor, num_key_tiles(keys))
        if self.threshold is not None:
            changed["threshold"] = min(self.threshold / factor, 0.9)
        return dataclasses.replace(self, **changed)

    def check_candidate(self) -> None:
        if self.coverage is not None or self.threshold is not None:
            raise ValueError(f"{self!r}: with a coverage or threshold the cost is not the budgets'")

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        """Slashes counted in tiles, with few to many columns."""
        return (
            cls(512, tiles=64, probes="spread"),
            cls(2048, tiles=64, probes="spread"),
            cls(4096, tiles=32, probes="spread"),
        )

    def budget(self) -> float:
        return self.columns + (self.slashes if self.tiles is None else KEY_TILE * self.tiles)

    def label(self) -> str:
        return "vertical-slash, lines" if self.tiles is None else "vertical-slash, tiles"

    def colour(self) -> Colour:
        return (0.10, 0.62, 0.47) if self.tiles is None else (0.12, 0.39, 0.71)

    def official(self) -> tuple[int, int] | None:
        known = (self.tiles, self.probes, self.coverage) == (None, "last", None)
        return (self.columns, self.slashes) if known else None

    @classmethod
    def from_official(cls, first: Any, second: Any) -> VerticalSlash:
        return cls(columns=first, slashes=second)

    @classmethod
    def former_fields(cls, version: int) -> set[str]:
        return {"density", "question"} if version <= 2 else set()

    @classmethod
    def from_fields(cls, fields: dict[str, Any], version: int) -> Pattern:
        """Files of version 2 and before have three families under this name, told apart by `probes`."""
        if version > 2 or isinstance(fields.get("probes"), str) or "probes" not in fields:
            return cls(**fields)
        return _from_version_2(fields)

    def _tiles(self) -> int:
        return tile_budget(self.slashes) if self.tiles is None else self.tiles


def _from_version_2(fields: dict[str, Any]) -> Pattern:
    """An entry with a number of probes: `SharedDensity` if it has a density, else `PerTile`."""
    # The other families' files import nothing of this one; imported here, so that neither depends on the other.
    from minference_jax.patterns.per_tile import PerTile
    from minference_jax.patterns.shared_density import SharedDensity

    fields = dict(fields)
    every, floor = fields.pop("probes"), (fields.pop("columns", 1000), fields.pop("slashes", 6096))
    if "density" in fields:
        return SharedDensity(every=every, **{"threshold": 0} | fields)  # which was what no threshold meant
    return PerTile(every=every, floor_columns=floor[0], floor_slashes=floor[1], **fields)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["columns", "slashes", "tiles", "spread", "coverage", "threshold"],
    meta_fields=["widths"],
)
@dataclasses.dataclass(frozen=True)
class VerticalSlashBudgets(Budgets):
    """Budgets of each head: `tiles` is −1 where slashes are counted as lines; `coverage` and `threshold` are inf for
    none; `spread` is `probes == "spread"`. `widths` (static): see `Widths`."""

    columns: Int[Array, "*layers n"]
    slashes: Int[Array, "*layers n"]
    tiles: Int[Array, "*layers n"]
    spread: Bool[Array, "*layers n"]
    coverage: Float[Array, "*layers n"]
    threshold: Float[Array, "*layers n"]
    widths: Widths

    def index(self, q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], where: Where) -> SparsePlan:
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "widths"}
        return vertical_slash_index(q, k, arrays, self.widths, **where.keywords())

    def for_part(self, share: Float[Array, "b 1"]) -> VerticalSlashBudgets:
        names = ("columns", "slashes", "tiles")
        return dataclasses.replace(self, **{name: part_of(getattr(self, name), share) for name in names})

    def widest(self, keys: int) -> VerticalSlashBudgets:
        lines, tiles = self.widths.lines, self.widths.tiles
        widths = self.widths._replace(
            columns=keys, slashes=keys if lines else 0, tiles=num_key_tiles(keys) if tiles or not lines else 0
        )
        return dataclasses.replace(self, widths=widths)
