"""Real text that comes with the package, for demonstrations, tests and evaluation; SOURCES.md has the licences."""

from __future__ import annotations

from importlib import resources

TEXTS = ("persuasion",)


def load_text(name: str = "persuasion") -> str:
    """One of `TEXTS`. Raises `ValueError` for another name."""
    if name not in TEXTS:
        raise ValueError(f"no text is named {name!r}; there are: {', '.join(TEXTS)}")
    return (resources.files(__name__) / f"{name}.txt").read_text(encoding="utf-8")
