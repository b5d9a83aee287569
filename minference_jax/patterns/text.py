"""The text form of patterns: `dense`, `vertical-slash:columns=64,tiles=16`, or a pattern file or preset."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from pathlib import Path

from minference_jax.models.config import LlamaConfig
from minference_jax.patterns import AShape, BlockSparse, Dense, HeadPatterns, Pattern, VerticalSlash
from minference_jax.patterns.files import load_patterns, preset

PATTERN_HELP = (
    "dense, a-shape, vertical-slash or block-sparse, with its fields as in "
    "'vertical-slash:columns=64,tiles=16,probes=spread'; or a pattern file (.json); or the name of a preset."
)
_KINDS = {"dense": Dense, "a-shape": AShape, "vertical-slash": VerticalSlash, "block-sparse": BlockSparse}


def parse_pattern(text: str, config: LlamaConfig) -> HeadPatterns | None:
    """One pattern for each head of a model; None for `dense`.

    Raises `ValueError` that says what was expected, and what `load_patterns` raises for a file.
    """
    if not text.strip():
        raise ValueError(f"a pattern is missing; there are {', '.join(_KINDS)}, files and presets")
    if text.partition(":")[0] in _KINDS:
        pattern = parse_uniform(text)
        dense = isinstance(pattern, Dense)
        return None if dense else HeadPatterns.uniform(pattern, config.num_layers, config.num_heads)
    if Path(text).exists():
        return load_patterns(text, heads=config.num_heads, layers=config.num_layers)
    try:
        return preset(text, config.num_layers, config.num_heads)
    except ValueError as error:
        raise ValueError(
            f"{text!r} is neither a file nor a pattern ({', '.join(_KINDS)}) nor a preset: {error}"
        ) from None


def parse_uniform(text: str) -> Pattern:
    """One pattern, for all heads, by kind and fields. Raises `ValueError` that says what was expected."""
    name, _, fields = text.partition(":")
    if name not in _KINDS:
        raise ValueError(f"{text!r} is no pattern ({', '.join(_KINDS)})")
    return _with_fields(_KINDS[name], name, fields)


def count_kinds(patterns: HeadPatterns) -> list[tuple[str, int]]:
    """How many heads follow each kind of pattern, the most frequent first."""
    return Counter(format_pattern(p).partition(":")[0] for layer in patterns for p in layer).most_common()


def format_pattern(pattern: Pattern) -> str:
    """The text that `parse_pattern` reads back as `pattern`; fields that hold their default are left out."""
    name = next(name for name, kind in _KINDS.items() if type(pattern) is kind)
    changed = [
        f"{field.name}={getattr(pattern, field.name)}"
        for field in dataclasses.fields(pattern)
        if getattr(pattern, field.name) != field.default
    ]
    return f"{name}:{','.join(changed)}" if changed else name


def describe_patterns(patterns: HeadPatterns | None) -> str:
    """One short line for tables."""
    if patterns is None:
        return "dense"
    kinds = {format_pattern(pattern) for layer in patterns for pattern in layer}
    return kinds.pop() if len(kinds) == 1 else f"{len(kinds)} patterns, one per head"


def _with_fields(kind: type[Pattern], name: str, text: str) -> Pattern:
    known = [field.name for field in dataclasses.fields(kind)]
    values = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            fields = f"; its fields: {', '.join(known)}" if known else ", which has no fields"
            raise ValueError(f"{part!r} is no field=value of {name}{fields}")
        if key in values:
            raise ValueError(f"{key} is given twice in {name}:{text}")
        values[key] = _value(key, value)
    try:
        return kind(**values)
    except TypeError as error:  # a word where a number belongs
        raise ValueError(str(error)) from None


_WORDS = ("probes",)
"""Fields that may hold a word."""


def _value(key: str, text: str) -> int | float | str | None:
    if text == "None":
        return None
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        if key in _WORDS:
            return text
        raise ValueError(f"{key} must be a number, got {text!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{key} must be finite, got {text}")
    return number
