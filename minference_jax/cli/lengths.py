"""Numbers of tokens on the command line: `8192`, `8K` or `1M`, the same in every command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from minference_jax.cli.console import MAX_TOKENS, usage_error

HOW = "K and M count 1,024 and its square."
"""For the help of an option that takes lengths."""


def parse_length(text: str | int, least: int = 1) -> int:
    """A number of tokens: `8192`, `8K` or `1M`. Raises a usage error for anything else, and out of range."""
    number, factor = str(text).strip(), 1
    if number[-1:].upper() in ("K", "M"):
        number, factor = number[:-1], 1 << (10 if number[-1:].upper() == "K" else 20)
    if not (number.isascii() and number.isdecimal()):
        raise usage_error(f"{text!r} is no length; write 8192, 8K or 1M")
    if not least <= int(number) * factor:
        raise usage_error(f"{text!r} is no length here: at least {least} is")
    if int(number) * factor > MAX_TOKENS:
        raise usage_error(f"{text!r} is more than {MAX_TOKENS:,} tokens")
    return int(number) * factor


def parse_lengths(option: str, text: str) -> list[int]:
    """Lengths with commas, each once. Raises a usage error that names the option."""
    try:
        return list(dict.fromkeys(map(parse_length, text.split(","))))
    except typer.BadParameter as error:
        raise usage_error(f"{option} must be lengths with commas: {error.message}") from None


def length_option(*names: str, help: str, least: int = 1, **options: Any) -> Any:
    """An option that takes one length, at least `least`."""
    parser: Callable[[Any], int] = lambda text: parse_length(text, least)  # noqa: E731
    return typer.Option(*names, parser=parser, metavar="TOKENS", help=help, **options)
