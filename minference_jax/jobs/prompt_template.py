"""A prompt with places for a row's fields: "Is this positive? {text}"."""

from __future__ import annotations

import dataclasses
import functools
import json
import string
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """Text in which `{name}` stands for the field `name` of a row; `{{` and `}}` are braces.

    Raises `ValueError` for a place without a name, a format or a conversion, and for braces that do not match.
    """

    text: str

    def __post_init__(self) -> None:
        self.fields  # noqa: B018  # reads the text, which raises

    @functools.cached_property  # asked for every row
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that occur, each once."""
        try:
            places = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(f"prompt {self.text!r}: {error}; write {{{{ and }}}} for braces") from None
        names = []
        for _, name, form, conversion in places:
            if name is None:
                continue
            if not name.isidentifier() or form or conversion:
                raise ValueError(f"prompt: a place is a field's name in braces, such as {{text}}; got {{{name}}}")
            names.append(name)
        return tuple(dict.fromkeys(names))

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises `ValueError` naming the first row that lacks a field, and for a template that uses none."""
        if not self.fields:
            raise ValueError(f"prompt {self.text!r} uses no field, so all rows would be the same prompt")
        for number, row in enumerate(rows):
            for name in self.fields:
                if row.get(name) is None:
                    there = ", ".join(map(str, row)) or "none"
                    raise ValueError(f"row {number} has no field {name!r}; its fields are {there}")

    def fill(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row. Values that are no text are written as JSON."""
        return self.text.format_map({name: self.text_of(row, name) for name in self.fields})

    @staticmethod
    def text_of(row: Mapping[str, Any], name: str) -> str:
        """A field's value as the prompt has it."""
        value = row[name]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
