"""Figures without a display and without global state."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from minference_jax.extras import naming_extra

FORMATS = (".png", ".pdf", ".svg")


def has_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches. Raises ModuleNotFoundError without matplotlib."""
    with naming_extra("a picture"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def check_path(path: str | Path) -> Path:
    """The path of a picture, for before the work begins.

    Raises ValueError unless its suffix is one of `FORMATS`, ModuleNotFoundError without matplotlib.
    """
    path = Path(path)
    with naming_extra("a picture"):
        import matplotlib  # noqa: F401
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: pictures end in {', '.join(FORMATS)}")
    return path


def save(figure: Any, path: str | Path) -> None:
    """Writes a figure, in the format of the path's suffix."""
    figure.savefig(check_path(path), dpi=150)
