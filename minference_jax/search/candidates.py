"""The search space: families of patterns, each a line through the space of budgets.

A candidate names a pattern and the proportion of its budgets; the search scales all of them by one factor, so that
candidates can be brought to the same cost, and to several costs, without changing what they are.

Source: MInference (arXiv 2407.02490) Table 7 for the original's candidates, Algorithm 1 for adjusting them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from minference_jax.patterns import (
    AShape,
    BlockSparse,
    Dense,
    HeadPatterns,
    Limits,
    Pattern,
    PatternArrays,
    VerticalSlash,
)
from pallas_kernels.plan import num_key_tiles

PAPER_TARGET = AShape(1024, 4096)
"""What all of the original's candidates were brought to the cost of; a row visits as many keys with each."""

PAPER: tuple[Pattern, ...] = (
    AShape(1024, 4096),
    VerticalSlash(30, 2048),
    VerticalSlash(100, 1800),
    VerticalSlash(500, 1500),
    VerticalSlash(3000, 200),
    BlockSparse(100),
)
"""The original's candidates: MInference Table 7."""

CANDIDATES: tuple[Pattern, ...] = (
    *PAPER,
    AShape(64, 4096),
    VerticalSlash(512, tiles=64, probes="spread"),
    VerticalSlash(2048, tiles=64, probes="spread"),
    VerticalSlash(4096, tiles=32, probes="spread"),
)
"""The original's candidates; a window with a short sink; and slashes counted in tiles, with few to many columns."""

_BUDGETS: dict[type, tuple[str, ...]] = {
    AShape: ("sink", "window"),
    VerticalSlash: ("columns", "slashes", "tiles", "question"),
    BlockSparse: ("blocks",),
}


def check_candidates(candidates: Sequence[Pattern]) -> tuple[Pattern, ...]:
    """`candidates` as a tuple; ValueError if there is none, TypeError for one that has no budget to adjust."""
    candidates = tuple(candidates)
    if not candidates:
        raise ValueError("candidates must name at least one pattern")
    for candidate in candidates:
        if isinstance(candidate, Dense) or type(candidate) not in _BUDGETS:
            raise TypeError(f"candidates: {candidate!r} is no pattern with budgets")
        if isinstance(candidate, VerticalSlash) and _adapts(candidate):
            raise ValueError(f"candidates: {candidate!r}: with a coverage or threshold the cost is not the budgets'")
        if isinstance(candidate, VerticalSlash) and candidate.density is not None:
            raise ValueError(
                f"candidates: {candidate!r}: a density is shared by a layer's heads; each is searched alone"
            )
    strides = {c.probes for c in candidates if isinstance(c, VerticalSlash) and isinstance(c.probes, int)}
    if len(strides) > 1:
        raise ValueError(f"candidates with a probe every few rows must agree on it, got {sorted(strides)}")
    return candidates


def _adapts(pattern: VerticalSlash) -> bool:
    """Whether the prompt decides how much of the budgets a head takes. (Where a probe every few rows is taken, the
    threshold is the budget, which is scaled.)"""
    return not isinstance(pattern.probes, int) and (pattern.coverage is not None or pattern.threshold is not None)


def scaled(pattern: Pattern, factor: float, keys: int) -> Pattern:
    """The pattern with all budgets multiplied by `factor`, within what a prompt of `keys` tokens can hold, and a
    threshold divided by it; of a `density` at most all cells."""
    most = {"tiles": num_key_tiles(keys), "blocks": num_key_tiles(keys)}
    least = {"window": 1, "blocks": 1}
    changed = {}
    for name in _BUDGETS[type(pattern)]:
        value = getattr(pattern, name)
        if value is not None and not (name == "slashes" and getattr(pattern, "tiles", None) is not None):
            changed[name] = min(max(round(value * factor), least.get(name, 0)), most.get(name, keys))
    if isinstance(pattern, VerticalSlash) and pattern.threshold is not None:
        changed["threshold"] = min(pattern.threshold / factor, 0.9)
    if isinstance(pattern, VerticalSlash) and pattern.density is not None:
        changed["density"] = min(pattern.density * factor, 1.0)
    return dataclasses.replace(pattern, **changed)


def factor_at(density: float, keys: int) -> float:
    """About the factor at which a candidate of the original's size visits this share of the causal cells."""
    return density * keys / 2 / (PAPER_TARGET.sink + PAPER_TARGET.window)


def arrays(patterns: Sequence[Pattern], keys: int) -> PatternArrays:
    """One layer's patterns, all of one kind, as arrays whose static side depends on the kind and on `keys` only.

    So one compiled program serves every budget of a kind.
    """
    found = HeadPatterns((tuple(patterns),)).arrays().layer(0)
    (kind,) = found.limits.kinds
    lines = found.limits.lines
    tiles = num_key_tiles(keys)
    vertical_slash, a_shape = isinstance(patterns[0], VerticalSlash), isinstance(patterns[0], AShape)
    limits = Limits(
        kinds=(kind,),
        sink=keys if a_shape else 0,
        window=keys if a_shape else 0,
        columns=keys if vertical_slash else 0,
        slashes=keys if lines else 0,
        tiles=tiles if vertical_slash and not lines else 0,
        blocks=tiles if isinstance(patterns[0], BlockSparse) else 0,
        lines=lines,
        spread=found.limits.spread,
        every=found.limits.every,
        floor=keys if found.limits.floor else 0,
    )
    return dataclasses.replace(found, limits=limits)
