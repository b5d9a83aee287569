"""`patterns="auto"`: which sparse pattern a prompt of some length gets, where sparse attention pays at all."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

from minference_jax.index import tile_budget
from minference_jax.patterns import Dense, HeadPatterns, Pattern, SharedDensity, VerticalSlash

AUTO = "auto"

PAPER_PATTERN = VerticalSlash(columns=1000, tiles=tile_budget(6096))
"""The paper's largest budget, (1000, 6096), with the slashes counted in tiles."""

STEPS: tuple[tuple[int, SharedDensity | None, float], ...] = (
    (4_096, None, 0.0),
    (8_192, SharedDensity(density=0.25, every=8), 0.75),
    (16_384, SharedDensity(density=0.2, every=8), 0.85),
    (32_768, SharedDensity(density=0.12, every=16), 1.3),
    (65_536, SharedDensity(density=0.08, every=32), 1.5),
    (131_072, SharedDensity(density=0.045, every=64), 2.0),
)
"""Up to so many keys, this pattern (None: dense), with a threshold of so many times the mean weight, 1 / keys.

Longer prompts get the paper's budget, whose density goes on falling by itself. Of a short prompt, the keys that are
visited in any case are a large part, and dense attention is fast. With these thresholds a trained model's layers leave
about as many cells as others need more (qwen2 .5B: .86 of the mean weight make a density of .2 at 16K tokens, 1.4 one
of .12 at 32K)."""


def auto_pattern(keys: int) -> Pattern:
    """The pattern that `"auto"` gives every head for a prompt of up to `keys` tokens, room for the reply included."""
    for most, pattern, weights in STEPS:
        if keys <= most:
            return Dense() if pattern is None else dataclasses.replace(pattern, threshold=weights / keys)
    return PAPER_PATTERN


@lru_cache(maxsize=64)
def auto_patterns(layers: int, heads: int, keys: int) -> HeadPatterns:
    """`auto_pattern(keys)` for every head of a model. The same object for the same numbers."""
    return HeadPatterns.uniform(auto_pattern(keys), layers, heads)
