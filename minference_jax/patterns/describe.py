"""What the patterns of a model's heads are, in a few words."""

from __future__ import annotations

from collections import Counter

from minference_jax.patterns.heads import HeadPatterns
from minference_jax.patterns.text import format_pattern


def describe_patterns(patterns: HeadPatterns | None) -> str:
    """One short line for tables."""
    if patterns is None:
        return "dense"
    texts = {format_pattern(pattern) for pattern in patterns.distinct()}
    return texts.pop() if len(texts) == 1 else f"{len(texts)} patterns, one per head"


def count_kinds(patterns: HeadPatterns) -> list[tuple[str, int]]:
    """How many heads follow each family of patterns, the most frequent first."""
    return Counter(pattern.name for layer in patterns for pattern in layer).most_common()
