"""The text form of patterns: `dense`, `vertical-slash:columns=64,tiles=16`."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from minference_jax.patterns.base import Pattern
from minference_jax.patterns.registry import FAMILIES

PATTERN_HELP = (
    f"one of {', '.join(FAMILIES)}, with its fields as in 'vertical-slash:columns=64,tiles=16,probes=spread'; or a"
    " pattern file (.json); or the name of a preset."
)
"""What a command line says of its pattern options."""


def is_pattern_text(text: str) -> bool:
    """Whether a text begins with the name of a family, and so is meant as a pattern."""
    return text.partition(":")[0] in FAMILIES


def parse_pattern(text: str) -> Pattern:
    """One pattern, `name` or `name:field=value,field=value`, as in "a-shape:sink=64,window=1024".

    Raises ValueError that says what was expected: an unknown name or field, a field that occurs twice, a value that is
    no finite number or word, or out of range.
    """
    name, colon, fields = text.partition(":")
    if name not in FAMILIES:
        raise ValueError(f"{text!r} is no pattern ({', '.join(FAMILIES)})")
    if colon and not fields.strip():
        raise ValueError(f"{text!r} has a colon, but no field=value after it")
    family = FAMILIES[name]
    known = [field.name for field in dataclasses.fields(family)]
    values: dict[str, Any] = {}
    for part in fields.split(",") if fields else ():
        key, equals, value = part.strip().partition("=")
        if not equals or key not in known:
            listed = f"; its fields: {', '.join(known)}" if known else ", which has no fields"
            raise ValueError(f"{part!r} is no field=value of {name}{listed}")
        if key in values:
            raise ValueError(f"{text!r} gives {key} twice")
        values[key] = _value(value, part)
    try:
        return family(**values)
    except TypeError as error:  # a word where a number belongs, or a field that is missing
        raise ValueError(f"{text!r}: {error}") from None


def as_pattern(pattern: Pattern | str) -> Pattern:
    """A pattern as it is, or the one that a text names; raises what `parse_pattern` raises."""
    return parse_pattern(pattern) if isinstance(pattern, str) else pattern


def format_pattern(pattern: Pattern) -> str:
    """The text that `parse_pattern` reads back as `pattern`; fields that hold their default are left out.

    A plan builder, which has no text, is named by its class.
    """
    if FAMILIES.get(pattern.name) is not type(pattern):
        return type(pattern).__name__
    changed = [
        f"{field.name}={getattr(pattern, field.name)}"
        for field in dataclasses.fields(pattern)
        if getattr(pattern, field.name) != field.default
    ]
    return f"{pattern.name}:{','.join(changed)}" if changed else pattern.name


def _value(text: str, part: str) -> int | float | str | None:
    text = text.strip()
    if text == "None":
        return None
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        raise ValueError(f"{part!r}: {text} is not a number that patterns can hold")
    return number
