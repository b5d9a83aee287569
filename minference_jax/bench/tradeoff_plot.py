"""A picture of speed-up against RULER points lost: one line a method, one panel a length. Needs matplotlib."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minference_jax.bench.tradeoff_points import Point, sort_points
from minference_jax.eval.plots import COLOURS, MARKERS
from minference_jax.extras import naming_extra
from minference_jax.viz.figure import new_figure

with naming_extra("a plot"):
    from matplotlib.figure import Figure

NAMES = {
    "shared-density": "SharedDensity (this package)",
    "vertical-slash": "VerticalSlash (MInference)",
    "a-shape": "A-shape (StreamingLLM)",
    "query-aware": "QueryAware (FlexPrefill)",
    "antidiagonal": "Antidiagonal (XAttention)",
    "block-sparse": "BlockSparse (MInference)",
}
"""What the legend calls families, with where each is from."""


def title(found: Mapping[str, Any]) -> str:
    """What the picture says above its panels: model, prompts, what was timed where."""
    prompts = sorted({row["prompts"] for row in found["rows"]})
    some = str(prompts[0]) if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
    timed = f"timed on {found.get('inputs', 'unknown inputs')}, {found['environment'].get('device', 'unknown device')}"
    return ", ".join(filter(None, (found.get("model"), f"{some} prompts a task", timed)))


def draw(points: Sequence[Point], heading: str = "") -> Figure:
    """The picture.

    Error bars are one standard error; numbers are densities. A hollow marker: what was timed visits another share than
    what was answered. Points lost are drawn to scale up to `LINEAR`, and logarithmically beyond where that many are.
    """
    points = sort_points(points)
    lengths = list(dict.fromkeys(p.tokens for p in points))
    methods = list(dict.fromkeys(p.method for p in points))
    colours = {method: COLOURS[place % len(COLOURS)] for place, method in enumerate(methods)}
    across = len(lengths) if len(lengths) < 4 else -(-len(lengths) // 2)
    down = -(-len(lengths) // across)
    width, height = (6.6, 3.8) if len(lengths) == 1 else (3.0 * across, 0.9 + 2.9 * down)
    figure = new_figure(width, height)
    panels = list(figure.subplots(down, across, sharex=True, squeeze=False).flat)
    for panel, tokens in zip(panels, lengths, strict=False):
        here = [p for p in points if p.tokens == tokens]
        panel.axvline(0, color="#000000", lw=0.8)
        panel.axhline(1, color="#000000", lw=0.8)
        panel.plot(0, 1, "o", color="#000000", ms=5, label="dense attention")
        for place, method in enumerate(methods):
            look = {"color": colours[method], "label": NAMES.get(method, method)}
            _line(panel, [p for p in here if p.method == method], MARKERS[place % len(MARKERS)], look)
        _speed_scale(panel, [p.speedup for p in here])
        panel.set_title(f"{_short(tokens)} tokens", fontsize=10)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
    _loss_scale(panels[0], points)
    spare = panels[len(lengths) :]
    for panel in panels[max(len(lengths) - across, 0) : len(lengths)]:
        panel.set_xlabel("RULER points lost, ± standard error", fontsize=9)
        panel.tick_params(labelbottom=True)
    for panel in panels[::across]:
        panel.set_ylabel("attention, times as fast as dense", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    numbers = "numbers: density, the visited share"
    if any(p.unlike for p in points):
        numbers += f"{chr(10) if spare or across == 1 else '; '}hollow: timed at another density"
    look = {"fontsize": 9, "frameon": False, "title": numbers, "title_fontsize": 8}
    if spare:
        spare[0].axis("off")
        spare[0].legend(handles, labels, loc="center", **look)
    elif across == 1:
        figure.legend(handles, labels, loc="outside right center", **look)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=across, **look)
    figure.suptitle(textwrap.fill(heading, round(13.5 * width)), fontsize=10)
    figure.draw_without_rendering()  # lays panels out: labels are placed where lines leave room
    for panel, tokens in zip(panels, lengths, strict=False):
        _label(panel, [p for p in points if p.tokens == tokens], colours)
    return figure


def _line(panel: Any, points: Sequence[Point], marker: str, look: Mapping[str, Any]) -> None:
    lost, faster = [-p.ruler_difference for p in points], [p.speedup for p in points]
    errors = [p.standard_error for p in points]
    panel.errorbar(lost, faster, xerr=errors, fmt="none", elinewidth=1, capsize=2, alpha=0.5, color=look["color"])
    panel.plot(lost, faster, marker + "-", ms=5, lw=1.4, **look)
    for p, x, y in zip(points, lost, faster, strict=True):
        if p.unlike:
            panel.plot(x, y, marker, ms=5, mfc="#ffffff", mec=look["color"], zorder=5)


LINEAR = 2.0
"""Points lost up to which they are always drawn to scale."""


def _loss_scale(panel: Any, points: Sequence[Point]) -> None:
    """Of all panels, which share it."""
    low = min(0.0, *(-p.ruler_difference - p.standard_error for p in points))
    high = max(0.0, *(-p.ruler_difference + p.standard_error for p in points))
    if high > 5 * LINEAR:
        panel.set_xscale("symlog", linthresh=LINEAR, linscale=0.6)
        panel.set_xlim(low - 0.3, 1.2 * high)
        marks = [x for x in (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50) if low <= x <= high]
        panel.set_xticks(marks, [f"{x}".replace("-", "\N{MINUS SIGN}") for x in marks])
        panel.set_xticks([], minor=True)
    else:
        panel.set_xlim(min(1.1 * low, -LINEAR / 4), max(1.1 * high, LINEAR))


def _speed_scale(panel: Any, speedups: Sequence[float]) -> None:
    slow, fast = min(1.0, *speedups), max(1.0, *speedups)
    if fast > 4 * slow:
        panel.set_yscale("log")
        panel.set_ylim(slow / 1.25, fast * 1.25)
        marks = [m for m in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if slow / 1.25 <= m <= fast * 1.25]
        panel.set_yticks(marks, [f"{m:g}" for m in marks])
        panel.set_yticks([], minor=True)
    else:
        panel.margins(y=0.1)  # room for what is written above the fastest


def _label(panel: Any, points: Sequence[Point], colours: Mapping[str, str]) -> None:
    """Writes each point's density where it covers least: of eight places around it, the first with the fewest."""
    scale = panel.figure.dpi / 72  # pixels of a typographic point
    taken = [panel.transData.transform([[0.0, 1.0]])]
    for method in dict.fromkeys(p.method for p in points):
        own = [p for p in points if p.method == method]
        bars = [(-p.ruler_difference + sign * p.standard_error, p.speedup) for p in own for sign in (-0.9, 0.9)]
        corners = panel.transData.transform([(-p.ruler_difference, p.speedup) for p in own])
        steps = np.linspace(0, 1, 25)[:, None]
        taken += [a + steps * (b - a) for a, b in itertools.pairwise(corners)]
        taken += [corners, corners, panel.transData.transform(bars)]  # a marker hides more than a line
    covered = np.concatenate(taken)
    for p in points:
        text = f"{p.density:.2g}".lstrip("0")
        half = scale * np.array([0.3 * SIZE * len(text), 0.45 * SIZE])
        at = panel.transData.transform((-p.ruler_difference, p.speedup))
        places = [at + (half + 4 * scale) * np.array(way) for way in WAYS]
        costs = [_covers(covered, place, half) + 9 * (not panel.bbox.contains(*place)) for place in places]
        place = places[int(np.argmin(costs))]
        covered = np.concatenate([covered, place + half * CROSS, place + half * CROSS])
        shift = (place - at) / scale
        look = {"color": _darker(colours[p.method]), "fontsize": SIZE, "ha": "center", "va": "center"}
        panel.annotate(text, (-p.ruler_difference, p.speedup), shift, textcoords="offset points", **look)


SIZE = 7.0
WAYS = ((-1, 1), (1, -1), (-1.1, 0), (1.1, 0), (0, 1.1), (0, -1.1), (1, 1), (-1, -1))
CROSS = np.array([(x, y) for x in (-0.8, 0.0, 0.8) for y in (-0.8, 0.0, 0.8)])


def _darker(colour: str) -> str:
    """The colour of a text that is read as of a line of `colour`."""
    return "#" + "".join(f"{int(colour[i : i + 2], 16) * 2 // 3:02x}" for i in (1, 3, 5))


def _covers(covered: np.ndarray, place: np.ndarray, half: np.ndarray) -> int:
    """How many of the pixels `[n, 2]` a text around a place would hide."""
    return int((np.abs(covered - place) <= half).all(1).sum())


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
