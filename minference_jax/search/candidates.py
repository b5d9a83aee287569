"""The search space: families of patterns, each a line through the space of budgets.

A candidate names a pattern and the proportion of its budgets; the search scales all of them by one factor, so that
candidates can be brought to the same cost, and to several costs, without changing what they are.

Source: MInference (arXiv 2407.02490) Table 7 for the original's candidates, Algorithm 1 for adjusting them.
"""

from __future__ import annotations

from collections.abc import Sequence

from minference_jax.patterns import AShape, BlockSparse, LayerPatterns, Pattern, VerticalSlash, layer_patterns
from minference_jax.patterns.registry import FAMILIES
from minference_jax.patterns.text import as_pattern

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


def default_candidates() -> tuple[Pattern, ...]:
    """The original's candidates, and what each family adds: among others a window with a short sink, and slashes
    counted in tiles, with few to many columns."""
    return (*PAPER, *(candidate for family in FAMILIES.values() for candidate in family.candidates()))


def check_candidates(candidates: Sequence[Pattern | str]) -> tuple[Pattern, ...]:
    """`candidates`, patterns or texts, as a tuple of patterns.

    Raises ValueError if there is none or if they can't share a search, TypeError for one that has no budget to adjust.
    """
    if not candidates:
        raise ValueError("candidates must name at least one pattern")
    found = tuple(as_pattern(candidate) for candidate in candidates)
    for candidate in found:
        if not isinstance(candidate, Pattern):
            raise TypeError(f"candidates: {candidate!r} is no pattern with budgets")
        try:
            candidate.check_candidate()
        except (TypeError, ValueError) as error:
            raise type(error)(f"candidates: {error}") from None
    layer_patterns(found, len(found))  # heads of one model, which may have to agree on something
    return found


def factor_at(density: float, keys: int) -> float:
    """About the factor at which a candidate of the original's size visits this share of the causal cells."""
    return density * keys / 2 / (PAPER_TARGET.sink + PAPER_TARGET.window)


def arrays(patterns: Sequence[Pattern], keys: int) -> LayerPatterns:
    """One layer's patterns, all of one family, as arrays whose static side depends on the family and on `keys` only.

    So one compiled program serves every budget of a family.
    """
    return layer_patterns(tuple(patterns), len(patterns)).widest(keys)
