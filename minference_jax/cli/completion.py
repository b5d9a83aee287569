"""What a shell proposes for the values of options, where the program's completion is installed."""

from __future__ import annotations

from collections.abc import Iterable


def complete_pattern(incomplete: str) -> list[str]:
    """Families of patterns, presets, and auto."""
    from minference_jax.patterns.files import PRESETS
    from minference_jax.patterns.registry import FAMILIES

    return _beginning(incomplete, ("auto", *FAMILIES, *sorted(PRESETS)))


def complete_methods(incomplete: str) -> list[str]:
    """The last of methods with commas."""
    from minference_jax.eval.methods import ABOUT

    return _last(incomplete, ABOUT)


def complete_tasks(incomplete: str) -> list[str]:
    """The last of tasks and groups with commas."""
    from minference_jax.data import load_text
    from minference_jax.eval.tasks import GROUPS, known_tasks

    return _last(incomplete, (*GROUPS, *known_tasks(load_text()), "infinitebench", "longbench"))


def complete_dtype(incomplete: str) -> list[str]:
    """The dtypes of weights."""
    from minference_jax.cli.console import DTYPES

    return _beginning(incomplete, DTYPES)


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _last(incomplete: str, names: Iterable[str]) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in _beginning(last, names)]
