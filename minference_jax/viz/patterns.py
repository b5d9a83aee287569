"""The layer × head map of a model's patterns: kind by colour, budget by shade; density, recall and error beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from minference_jax.extras import naming_extra
from minference_jax.patterns import HeadPatterns
from minference_jax.viz.figure import check_path, new_figure, save

LIGHTEST = 0.25
"""Strength of the colour of the smallest budget; the largest one of all has 1."""

_TABLES = {"density": "densities", "recall": "recalls", "output error": "scores"}


def plot_patterns(patterns: HeadPatterns, path: str | Path, *, title: str = "") -> None:
    """Draws the map to a .png, .pdf or .svg file.

    The shade is the head's density where the patterns carry it (a search writes it) or all ask for one, else its budget
    in keys. Maps of
    density, recall and output error follow, those that the patterns carry.

    Raises ValueError for another suffix, ModuleNotFoundError without matplotlib.
    """
    check_path(path)
    tables = {name: np.asarray(getattr(patterns, field)) for name, field in _TABLES.items() if getattr(patterns, field)}
    shade = tables.get("density", _asked(patterns))
    tall = max(3.0, 0.16 * patterns.num_layers + 1.6)
    wide = max(2.6, 0.16 * patterns.num_heads + 1.8)
    figure = new_figure(wide * (1 + len(tables)), tall)
    axes = np.atleast_1d(figure.subplots(1, 1 + len(tables), sharey=True))
    _draw_kinds(axes[0], patterns, shade)
    for axis, (name, values) in zip(axes[1:], tables.items(), strict=True):
        limits = {"vmin": 0, "vmax": 1} if name != "output error" else {"vmin": 0}
        image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", **limits)
        axis.set(title=f"{name}, mean {values.mean():.3f}", xlabel="head")
        figure.colorbar(image, ax=axis, shrink=0.6)
    axes[0].set_ylabel("layer")
    if title:
        figure.suptitle(title)
    save(figure, path)


def _asked(patterns: HeadPatterns) -> Float[np.ndarray, "layers n"] | None:
    """The densities that the heads ask for, if all do."""
    shares = [[p.share() for p in layer] for layer in patterns]
    if any(share is None for layer in shares for share in layer):
        return None
    return np.asarray(shares, float)


def colours(patterns: HeadPatterns, density: Float[np.ndarray, "layers n"] | None = None) -> Float[np.ndarray, "l n 3"]:
    """Red, green and blue of each head's field."""
    budgets = np.asarray([[p.budget() for p in layer] for layer in patterns]) if density is None else density
    largest = np.max(budgets, initial=0, where=np.isfinite(budgets))
    share = np.where(np.isfinite(budgets), budgets / (largest or 1), 1)
    strength = LIGHTEST + (1 - LIGHTEST) * np.clip(share, 0, 1)
    full = np.asarray([[p.colour() for p in layer] for layer in patterns])
    return 1 - strength[..., None] * (1 - full)


def _draw_kinds(axis: Any, patterns: HeadPatterns, density: np.ndarray | None) -> None:
    with naming_extra("a picture"):
        from matplotlib.patches import Patch

    axis.imshow(colours(patterns, density), aspect="auto", interpolation="nearest")
    shade = "density" if density is not None else "budget"
    axis.set(title=f"pattern (darker: more {shade})", xlabel="head")
    used = dict(sorted({pattern.label(): pattern.colour() for pattern in patterns.distinct()}.items()))
    handles = [Patch(color=colour, label=label) for label, colour in used.items()]
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, fontsize="small")
