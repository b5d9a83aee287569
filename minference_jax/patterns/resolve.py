"""Patterns for a model, in any form in which a user may give them."""

from __future__ import annotations

import os
from pathlib import Path

from minference_jax.patterns.base import Pattern
from minference_jax.patterns.files import PRESETS, load_patterns, preset
from minference_jax.patterns.heads import HeadPatterns
from minference_jax.patterns.registry import FAMILIES
from minference_jax.patterns.text import is_pattern_text, parse_pattern

Patterns = Pattern | HeadPatterns | str | os.PathLike | None
"""A pattern or plan builder for all heads, one for each, a pattern's text, a preset, a pattern file; None for dense."""


def resolve_patterns(patterns: Patterns, layers: int, heads: int) -> HeadPatterns | None:
    """`patterns` in any accepted form, as one pattern for each of `layers` × `heads` heads; None for dense attention.

    **Raises:** TypeError for anything else; ValueError for a text that is neither a pattern nor a preset nor a file,
    and for another number of layers or heads; what `load_patterns` raises for a file.
    """
    found = None if patterns is None else _found(patterns, layers, heads)
    return None if found is None or found.dense else found


def _found(patterns: Pattern | HeadPatterns | str | os.PathLike, layers: int, heads: int) -> HeadPatterns:
    if isinstance(patterns, Pattern):
        return HeadPatterns.uniform(patterns, layers, heads)
    if isinstance(patterns, HeadPatterns):
        if (patterns.num_layers, patterns.num_heads) != (layers, heads):
            raise ValueError(
                f"patterns are for {patterns.num_layers} layers of {patterns.num_heads} heads; the model has {layers} "
                f"layers of {heads} heads"
            )
        return patterns
    if not isinstance(patterns, str | os.PathLike):
        raise TypeError(
            f"patterns must be None, a pattern, HeadPatterns, a pattern's text or the path of a file, got {patterns!r}"
        )
    text = os.fspath(patterns)
    if not text.strip():  # a path of no name is the current directory
        raise ValueError(f"a pattern is missing: give one of {', '.join(FAMILIES)}, a preset or a file")
    if is_pattern_text(text):
        return HeadPatterns.uniform(parse_pattern(text), layers, heads)
    if text in PRESETS:
        return preset(text, layers, heads)
    if Path(text).exists() or text.endswith(".json"):
        return load_patterns(text, heads=heads, layers=layers)
    raise ValueError(
        f"{text!r} is neither a file nor a pattern ({', '.join(FAMILIES)}) nor a preset ({', '.join(sorted(PRESETS))})"
    )
