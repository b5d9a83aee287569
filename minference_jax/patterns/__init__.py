"""The sparse patterns a head can follow, as frozen (hashable) configuration, and one pattern per head of a model."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.plan import SparsePlan
from pallas_kernels.sizes import QUERY_TILE

MAX_BUDGET = 1 << 24
"""Largest accepted budget: longer than any prompt, so a larger number is a mistake."""

GROWTH = 8
"""How many times its budget a head of `VerticalSlash(threshold=...)` may take: it decides static widths."""


def _check_budget(owner: str, name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if not low <= value <= MAX_BUDGET:
        raise ValueError(f"{owner}: {name} must be between {low} and {MAX_BUDGET}, got {value}")


@dataclasses.dataclass(frozen=True)
class Dense:
    """Causal attention to every earlier key."""


@dataclasses.dataclass(frozen=True)
class AShape:
    """Attention sinks and a sliding window: the first `sink` keys and the last `window` ones (A-shape, also known
    as StreamingLLM's mask). Needs no index.

    Source: MInference (arXiv 2407.02490) §3.2; `stream_llm` in the official pattern files.
    """

    sink: int = 1024
    window: int = 4096

    def __post_init__(self) -> None:
        _check_budget("AShape", "sink", self.sink, 0)
        _check_budget("AShape", "window", self.window, 1)


@dataclasses.dataclass(frozen=True)
class VerticalSlash:
    """A few key columns that every query sees, and a few diagonals at fixed distances, found anew for each prompt.

    **Fields** (budgets are clamped to the prompt's length):

    - `columns`: key positions ("vertical lines").
    - `slashes`: distances ("slash lines"), as the original counts them. Ignored when `tiles` is given.
    - `tiles`: 64-key tiles at fixed distances before each 128-query tile. Tiles are what a kernel visits, so this
      budget has a cost that does not depend on the prompt, and holds more softmax mass at the same cost.
    - `probes`: the query rows that the estimate looks at: `"last"` (the last 64, the original), `"spread"` (the
      last 16 and 48 more spread evenly over the prompt, for attention that changes along the prompt), or a number m
      (static, a divisor of 128, the same in all heads of a model): every m-th row, with a `density` among them the
      first and the last of each query tile; see below.
    - `coverage`: if given, each head keeps only its best entries until they hold this share of the estimated
      mass; the budgets remain upper limits, so shapes and compiled code do not change.
    - `threshold`: if given (with `tiles`), the budgets are what every head gets at least, and a head whose attention
      is spread wider takes more, up to `GROWTH` times: all tiles and columns whose keys have at least this mean
      attention weight by the estimate. About 1 / (2 · prompt length) is a start; half of it visits more.
    - `density`: if given (with a number of `probes`, instead of a `threshold`), the share of the causal cells that a
      layer visits, in (0, 1]; see below.
    - `question`: if given (with a `density`), so many keys are columns of every head in any case: those that the last
      64 rows attend to most, as in the original. The query tiles of these rows visit every key.

    With a number of `probes` and a `threshold` (no `tiles`, no `coverage`), each head visits the columns, and each of
    its query tiles the key tiles, whose mean attention weight reaches the threshold; `columns` and `slashes` are a
    floor: a head that would keep less of the softmax mass than under the original's rule with that budget (or with
    more slashes for fewer columns, at about the same cost) gets a lower threshold of its own. 0 and 0 leave next to no
    floor. The estimate costs 1 / m of dense attention's scores, and memory that grows with the length's square.

    With a number of `probes` and a `density`, the threshold is found for each prompt: one for all heads of a layer that
    give a density, the smallest at which they visit together no more than the sum of their shares. So heads compete,
    and every prompt (and every part of one) has the density, from below, to within about a tile. `columns` and
    `slashes` are ignored. What `question` asks for is part of the share; a prompt so short that this, the diagonal and
    the first keys are more visits just these. `minference_jax.search.share_among_layers` gives each layer a share of
    its own. (Under shard_map the heads are those of one device.)

    The defaults are the original's rule and its most frequent budget. What keeps most of the softmax mass on real text
    at a quarter of the cells of an N-token prompt: up to some thousand tokens `VerticalSlash(columns=N // 4,
    slashes=round(N**0.8 / 7), probes=8, threshold=0.7 / N)`; for long prompts, where the estimate must be cheap,
    `VerticalSlash(columns=N // 20, tiles=N // 1024, probes="spread", threshold=0.5 / N)`: see
    `minference_jax.bench.recall`.

    Source: MInference (arXiv 2407.02490) §3.2, Algorithm 2. `tiles`, all `probes` but the last rows, `coverage`,
    `threshold`, `density` and the last query tiles that see all are ours.
    """

    columns: int = 1000
    slashes: int = 6096
    tiles: int | None = None
    probes: Literal["last", "spread"] | int = "last"
    coverage: float | None = None
    threshold: float | None = None
    density: float | None = None
    question: int | None = None

    def __post_init__(self) -> None:
        for name in ("columns", "slashes", "tiles", "question"):
            if getattr(self, name) is not None or name in ("columns", "slashes"):
                _check_budget("VerticalSlash", name, getattr(self, name), 0)
        if isinstance(self.probes, int) and not isinstance(self.probes, bool):
            known, per_tile = 1 <= self.probes <= QUERY_TILE and QUERY_TILE % self.probes == 0, True
        else:
            known, per_tile = self.probes in ("last", "spread"), False
        if not known:
            known_ones = f"'last', 'spread' or a divisor of {QUERY_TILE}"
            raise ValueError(f"VerticalSlash: probes must be {known_ones}, got {self.probes!r}")
        if self.coverage is not None and not 0.0 < self.coverage <= 1.0:
            raise ValueError(f"VerticalSlash: coverage must be in (0, 1], got {self.coverage}")
        if self.threshold is not None and not 0.0 < self.threshold < 1.0:
            raise ValueError(f"VerticalSlash: threshold must be in (0, 1), got {self.threshold}")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ValueError(f"VerticalSlash: density must be in (0, 1], got {self.density}")
        if self.density is not None and (self.threshold is not None or not per_tile):
            raise ValueError("VerticalSlash: density needs probes every few rows, and takes no threshold")
        if self.question is not None and self.density is None:
            raise ValueError("VerticalSlash: question needs a density")
        budgeted = self.threshold is not None or self.density is not None
        if per_tile and (not budgeted or self.tiles is not None or self.coverage is not None):
            raise ValueError("VerticalSlash: probes by number need a threshold or density, neither tiles nor coverage")
        if self.threshold is not None and self.tiles is None and not per_tile:
            raise ValueError("VerticalSlash: threshold needs tiles; lines have no mean weight to compare")


@dataclasses.dataclass(frozen=True)
class BlockSparse:
    """The `blocks` most promising 64-key tiles of each 128-query tile, found by mean-pooled queries and keys.

    The two tiles of the diagonal and the first tile are always among them.

    Source: MInference (arXiv 2407.02490) §3.2, Algorithm 3 (which uses 64-query tiles).
    """

    blocks: int = 100

    def __post_init__(self) -> None:
        _check_budget("BlockSparse", "blocks", self.blocks, 1)


Pattern = Dense | AShape | VerticalSlash | BlockSparse

DENSE, A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE, PER_TILE = range(5)
"""Codes of `PatternArrays.kind`; PER_TILE is `VerticalSlash` with a probe every few rows."""

_CODES = {Dense: DENSE, AShape: A_SHAPE, VerticalSlash: VERTICAL_SLASH, BlockSparse: BLOCK_SPARSE}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What occurs anywhere in a set of head patterns: the static side of `PatternArrays`, which decides shapes and
    which estimators are compiled. A width is 0 when no head uses that budget."""

    kinds: tuple[int, ...]
    sink: int = 0
    window: int = 0
    columns: int = 0
    slashes: int = 0
    tiles: int = 0
    blocks: int = 0
    lines: bool = False
    spread: bool = False
    adaptive: bool = False
    threshold: bool = False
    density: bool = False
    """Heads with a probe every few rows share a density; else each has a threshold. Some have a `question`:"""
    question: bool = False
    every: int = 0
    """Rows to a probe where heads have one every few rows, and their largest number of slashes:"""
    floor: int = 0
    covers: int = 0
    """Up to this many keys, every head's budget covers every key: the patterns are dense attention."""


class PlanBuilder(abc.ABC):
    """What makes one layer's plan where no pattern of this package does: a baseline, an oracle, an index kept from
    another prompt. `make_plan`, `sparse_attention` and the models accept it in place of a pattern, for all heads.

    A subclass is a frozen dataclass and a registered pytree. Its array leaves have a leading layer axis in a model,
    which scans over them, and none where it is used for one layer; its other fields are static (hashable).
    """

    limits = Limits(kinds=())

    @abc.abstractmethod
    def build(
        self,
        q: Float[Array, "b t n h"],
        k: Float[Array, "b s k h"],
        *,
        lengths: Int[Array, " b"],
        q_offset: Int[Array, ""],
        scale: float,
    ) -> SparsePlan:
        """The plan for these queries and keys: arguments as `make_plan` checks and completes them."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kind", "first", "second", "tiles", "spread", "coverage", "threshold", "density"],
    meta_fields=["limits"],
)
@dataclasses.dataclass(frozen=True)
class PatternArrays:
    """Head patterns as arrays, so that they can ride through `jax.lax.scan` over layers or be traced arguments.

    The leaves have shape `[layers, heads]`; scanning over a PatternArrays, or indexing its leaves, gives one
    layer's, with shape `[heads]`, which `make_plan` and `sparse_attention` accept. All layers share `limits`.

    - `kind`: int32 codes DENSE, A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE, PER_TILE.
    - `first`: int32; sink, columns, blocks or, with a density, `question`. `second`: int32; window or slashes.
    - `tiles`: int32; −1 where slashes are counted as lines.
    - `spread`: bool, `probes == "spread"`. `coverage`, `threshold`, `density`: float32, `inf` for none.
    """

    kind: Int[Array, "*layers n"]
    first: Int[Array, "*layers n"]
    second: Int[Array, "*layers n"]
    tiles: Int[Array, "*layers n"]
    spread: Bool[Array, "*layers n"]
    coverage: Float[Array, "*layers n"]
    threshold: Float[Array, "*layers n"]
    density: Float[Array, "*layers n"]
    limits: Limits

    def layer(self, index: int) -> PatternArrays:
        """Layer `index`, with leaves `[heads]`."""
        return jax.tree.map(lambda leaf: leaf[index], self)


@dataclasses.dataclass(frozen=True)
class HeadPatterns:
    """One pattern for each query head of each layer: `layers[layer][head]`. Hashable.

    `scores`, `densities` and `recalls`, if given, have one number a head, as found by a pattern search: the relative
    error of the head's output (in the original's files, whatever its search wrote), visited / causal cells, and the
    share of the dense softmax mass on visited keys. Nothing in this package acts on them.

    Raises ValueError if there is no layer, no head, or if layers differ in their number of heads; TypeError if an
    entry is no pattern.
    """

    layers: tuple[tuple[Pattern, ...], ...]
    scores: tuple[tuple[float, ...], ...] | None = None
    densities: tuple[tuple[float, ...], ...] | None = None
    recalls: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(tuple(layer) for layer in self.layers))
        heads = {len(layer) for layer in self.layers}
        if not self.layers or heads == {0}:
            raise ValueError("HeadPatterns needs at least one layer and one head")
        if len(heads) > 1:
            counts = [len(layer) for layer in self.layers]
            odd = next(i for i, count in enumerate(counts) if count != counts[0])
            raise ValueError(f"HeadPatterns: layer {odd} has {counts[odd]} heads, layer 0 has {counts[0]}")
        for index, layer in enumerate(self.layers):
            for head, pattern in enumerate(layer):
                if type(pattern) not in _CODES:
                    raise TypeError(f"HeadPatterns: layer {index}, head {head} is {pattern!r}, which is no pattern")
        for name in ("scores", "densities", "recalls"):
            table = getattr(self, name)
            if table is None:
                continue
            object.__setattr__(self, name, tuple(tuple(layer) for layer in table))
            if [len(layer) for layer in table] != [len(layer) for layer in self.layers]:
                raise ValueError(f"HeadPatterns: {name} and layers differ in shape")

    @classmethod
    def uniform(cls, pattern: Pattern, layers: int, heads: int) -> HeadPatterns:
        """The same pattern for every head."""
        return cls(((pattern,) * heads,) * layers)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Query heads per layer."""
        return len(self.layers[0])

    def layer(self, index: int) -> tuple[Pattern, ...]:
        """The patterns of one layer's heads."""
        return self.layers[index]

    def __iter__(self) -> Iterator[tuple[Pattern, ...]]:
        return iter(self.layers)

    def arrays(self) -> PatternArrays:
        """Kinds and budgets as arrays with a leading layer axis; see `PatternArrays`."""
        return _arrays(self.layers)


def head_arrays(
    pattern: Pattern | Sequence[Pattern] | PatternArrays | PlanBuilder, heads: int
) -> PatternArrays | PlanBuilder:
    """One layer's patterns, given in any accepted form, as arrays `[heads]`; a plan builder as it is.

    Raises TypeError for anything that is no pattern, ValueError for the wrong number of heads.
    """
    if isinstance(pattern, PlanBuilder):
        return pattern
    if isinstance(pattern, PatternArrays):
        if pattern.kind.shape != (heads,):
            raise ValueError(f"pattern arrays have shape {pattern.kind.shape}; expected ({heads},), one layer's heads")
        return pattern
    if isinstance(pattern, HeadPatterns):
        raise TypeError("pattern is a HeadPatterns of a whole model; pass one layer's: patterns.layer(l) or .arrays()")
    if type(pattern) in _CODES:
        pattern = (pattern,) * heads  # type: ignore[assignment]
    if not isinstance(pattern, Sequence) or any(type(p) not in _CODES for p in pattern):
        raise TypeError(f"pattern must be a pattern, one pattern per head or PatternArrays, got {pattern!r}")
    if len(pattern) != heads:
        raise ValueError(f"pattern has {len(pattern)} entries; q has {heads} heads")
    return _arrays((tuple(pattern),)).layer(0)


def _code(pattern: Pattern) -> int:
    per_tile = isinstance(pattern, VerticalSlash) and isinstance(pattern.probes, int)
    return PER_TILE if per_tile else _CODES[type(pattern)]


def _covers(pattern: Pattern) -> int:
    if isinstance(pattern, Dense):
        return MAX_BUDGET
    if isinstance(pattern, AShape):
        return max(pattern.sink, pattern.window)
    if isinstance(pattern, BlockSparse):
        return 64 * pattern.blocks
    if pattern.coverage is not None or _code(pattern) == PER_TILE:
        return 0
    return max(pattern.columns, pattern.slashes) if pattern.tiles is None else 64 * pattern.tiles


def _arrays(layers: tuple[tuple[Pattern, ...], ...]) -> PatternArrays:
    shape = (len(layers), len(layers[0]))
    kind, first, second = (np.zeros(shape, np.int32) for _ in range(3))
    tiles, spread = np.full(shape, -1, np.int32), np.zeros(shape, bool)
    coverage, threshold, density = (np.full(shape, np.inf, np.float32) for _ in range(3))
    patterns = [pattern for layer in layers for pattern in layer]
    for at, pattern in zip(np.ndindex(shape), patterns, strict=True):
        kind[at] = _code(pattern)
        if isinstance(pattern, AShape):
            first[at], second[at] = pattern.sink, pattern.window
        elif isinstance(pattern, BlockSparse):
            first[at] = pattern.blocks
        elif isinstance(pattern, VerticalSlash):
            first[at] = pattern.columns if pattern.density is None else pattern.question or 0
            second[at] = pattern.slashes
            tiles[at] = -1 if pattern.tiles is None else pattern.tiles
            spread[at] = pattern.probes == "spread"
            coverage[at] = np.inf if pattern.coverage is None else pattern.coverage
            threshold[at] = np.inf if pattern.threshold is None else pattern.threshold
            density[at] = np.inf if pattern.density is None else pattern.density
    a_shape = [p for p in patterns if isinstance(p, AShape)]
    vertical_slash = [p for p in patterns if isinstance(p, VerticalSlash) and _code(p) == VERTICAL_SLASH]
    per_tile = [p for p in patterns if isinstance(p, VerticalSlash) and _code(p) == PER_TILE]
    strides = {p.probes for p in per_tile if isinstance(p.probes, int)}
    if len(strides) > 1:
        raise ValueError(f"VerticalSlash: heads with a probe every few rows must agree on it, got {sorted(strides)}")
    shared = {p.density is not None for p in per_tile}
    if len(shared) > 1:
        raise ValueError("VerticalSlash: heads with a probe every few rows must all have a threshold or all a density")
    lines = [p for p in vertical_slash if p.tiles is None]
    growth = {p: 1 if p.threshold is None else GROWTH for p in vertical_slash}
    limits = Limits(
        kinds=tuple(sorted({_code(p) for p in patterns})),
        sink=max((p.sink for p in a_shape), default=0),
        window=max((p.window for p in a_shape), default=0),
        columns=max((growth[p] * p.columns for p in vertical_slash), default=0),
        slashes=max((p.slashes for p in lines), default=0),
        tiles=max((growth[p] * p.tiles for p in vertical_slash if p.tiles is not None), default=0),
        blocks=max((p.blocks for p in patterns if isinstance(p, BlockSparse)), default=0),
        lines=bool(lines),
        spread=any(p.probes == "spread" for p in vertical_slash),
        adaptive=any(p.coverage is not None for p in vertical_slash),
        threshold=any(p.threshold is not None for p in vertical_slash),
        density=any(shared),
        question=any(p.question for p in per_tile),
        every=max(strides, default=0),
        floor=max((p.slashes for p in per_tile if p.density is None), default=0),
        covers=min(map(_covers, patterns)),
    )
    leaves = (jnp.asarray(leaf) for leaf in (kind, first, second, tiles, spread, coverage, threshold, density))
    return PatternArrays(*leaves, limits=limits)
