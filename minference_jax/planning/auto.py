"""`patterns="auto"`: which sparse pattern a prompt of some length gets, where sparse attention pays at all."""

from __future__ import annotations

from functools import lru_cache

from minference_jax.index import tile_budget
from minference_jax.patterns import Dense, HeadPatterns, Pattern, SharedDensity, VerticalSlash

AUTO = "auto"

PAPER_PATTERN = VerticalSlash(columns=1000, tiles=tile_budget(6096))
"""The paper's largest budget, (1000, 6096), with the slashes counted in tiles."""

STEPS: tuple[tuple[int, Pattern], ...] = (
    (4_096, Dense()),
    (8_192, SharedDensity(density=0.25, every=8)),
    (16_384, SharedDensity(density=0.2, every=8)),
    (32_768, SharedDensity(density=0.12, every=16)),
    (65_536, SharedDensity(density=0.08, every=16)),
    (131_072, SharedDensity(density=0.045, every=64)),
)
"""Up to so many keys, this pattern; longer prompts get the paper's budget, whose density goes on falling by itself.

Of a short prompt, the keys that are visited in any case are a large part, and dense attention is fast."""


def auto_pattern(keys: int) -> Pattern:
    """The pattern that `"auto"` gives every head for a prompt of up to `keys` tokens, room for the reply included."""
    return next((pattern for most, pattern in STEPS if keys <= most), PAPER_PATTERN)


@lru_cache(maxsize=64)
def auto_patterns(layers: int, heads: int, keys: int) -> HeadPatterns:
    """`auto_pattern(keys)` for every head of a model. The same object for the same numbers."""
    return HeadPatterns.uniform(auto_pattern(keys), layers, heads)
