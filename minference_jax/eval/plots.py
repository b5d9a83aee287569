"""Plots of an evaluation: where needles are found, and scores and perplexity against length. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence

from minference_jax.eval.results import Cell, Result, perplexity_cell, score_cell
from minference_jax.eval.tasks import GROUPS
from minference_jax.extras import naming_extra

with naming_extra("a plot"):
    from matplotlib import rc_context
    from matplotlib.figure import Figure


def figures(results: Sequence[Result]) -> dict[str, Figure]:
    """Every plot that the results allow, by name: `needle`, `score-<group or task>`, `perplexity`."""
    found: dict[str, Figure] = {}
    needles = [r for r in results if r.task in GROUPS["niah"] and r.score is not None]
    if needles:
        found["needle"] = needle_map(needles)
    rest = {r.task for r in results if r.score is not None}
    for name, members in GROUPS.items():
        if rest & set(members):
            found[f"score-{name}"] = lines([r for r in results if r.task in members], f"{name}: score, %")
            rest -= set(members)
    for task in sorted(rest):
        found[f"score-{task}"] = lines([r for r in results if r.task == task], f"{task}: score, %")
    texts = [r for r in results if r.nll is not None]
    if texts:
        found["perplexity"] = lines(texts, "perplexity")
    return found


def needle_map(results: Sequence[Result]) -> Figure:
    """A panel for each method: prompt length across, the needle's depth down, the share found as colour."""
    methods = list(dict.fromkeys(r.method for r in results))
    lengths, depths = sorted({r.length for r in results}), sorted({r.about["depth"] for r in results})
    figure = Figure(figsize=(1.2 + 0.5 * len(methods) * max(len(lengths), 3), 3.6), layout="constrained")
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    image = None
    for panel, method in zip(panels, methods, strict=True):
        grid = [
            [
                _mean([r for r in results if (r.method, r.length, r.about["depth"]) == (method, length, depth)])
                for length in lengths
            ]
            for depth in depths
        ]
        image = panel.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        panel.set_title(method, fontsize=9)
        panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    panels[0].set_ylabel("needle's depth in the text")
    figure.supxlabel("prompt tokens", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="found, %")
    return figure


def lines(results: Sequence[Result], label: str) -> Figure:
    """One line for each method against prompt length, with its interval as a band."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(r.method for r in results):
        own = [r for r in results if r.method == method]
        lengths = sorted({r.length for r in own})
        cells = [_cell([r for r in own if r.length == length]) for length in lengths]
        dash = "--" if method == "dense" else "-"
        (line,) = axes.plot(lengths, [cell.value for cell in cells], dash, marker="o", markersize=4, label=method)
        axes.fill_between(
            lengths, [c.low for c in cells], [c.high for c in cells], color=line.get_color(), alpha=0.12, lw=0
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({r.length for r in results})
    axes.set_xticks(ticks, [_short(length) for length in ticks])
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel(label)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element, the same for the same figure."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "minference"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _cell(results: list[Result]) -> Cell:
    cell = score_cell(results) or perplexity_cell(results)
    assert cell is not None
    return cell


def _mean(results: Sequence[Result]) -> float:
    scores = [r.score for r in results if r.score is not None]
    return 100 * sum(scores) / len(scores) if scores else float("nan")


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
