"""Pictures of an evaluation: where needles are found, scores by length or as bars, differences from dense attention.

Colours are Okabe and Ito's, which colour-blind readers tell apart; methods differ by markers too. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minference_jax.eval.paired import Difference, differences
from minference_jax.eval.results import Cell, Result, perplexity_cell, score_cell
from minference_jax.eval.tasks import GROUPS
from minference_jax.extras import naming_extra

with naming_extra("a plot"):
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = "sD^vPX*"
MAP = "cividis"
"""A colour map whose lightness rises all the way, the same for readers who see no red or green."""


def figures(results: Sequence[Result]) -> dict[str, Figure]:
    """Every picture that the results allow, by name: `needle`, `score-<group or task>`, `perplexity`, `difference`."""
    found: dict[str, Figure] = {}
    needles = [r for r in results if "depth" in r.about and r.score is not None]
    if needles:
        found["needle"] = needle_map(needles)
    rest = {r.task for r in results if r.score is not None}
    draw = lines if len({r.length for r in results}) > 1 else bars
    for name, members in GROUPS.items():
        if rest & set(members):
            found[f"score-{name}"] = draw([r for r in results if r.task in members], f"{name}: score, %")
            rest -= set(members)
    for task in sorted(rest):
        found[f"score-{task}"] = draw([r for r in results if r.task == task], f"{task}: score, %")
    texts = [r for r in results if r.nll is not None]
    if texts:
        found["perplexity"] = draw(texts, "perplexity")
    for name, likelihood in (("difference", False), ("difference-likelihood", True)):
        if changed := [one for one in differences(results) if one.likelihood == likelihood]:
            found[name] = difference_plot(changed)
    return found


def _look(methods: Sequence[str]) -> Callable[[str], tuple[str, str]]:
    """Colour and marker of each method; dense attention is black."""
    others = [method for method in methods if method != "dense"]

    def look(method: str) -> tuple[str, str]:
        if method == "dense":
            return "#000000", "o"
        place = others.index(method)
        return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]

    return look


def needle_map(results: Sequence[Result]) -> Figure:
    """A panel for each method: prompt length across, the needle's depth down, the share found as colour and number."""
    methods = list(dict.fromkeys(r.method for r in results))
    lengths, depths = sorted({r.length for r in results}), sorted({r.about["depth"] for r in results})
    across = min(len(methods), 2)
    down = -(-len(methods) // across)
    width = 1.6 + across * max(0.5 * len(lengths), 1.9)
    figure = Figure(figsize=(width, 0.8 + down * (0.5 + 0.25 * len(depths))), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flat
    image = None
    for panel, method in zip(panels, methods, strict=False):
        at = {(r.length, r.about["depth"]): [] for r in results if r.method == method}
        for r in results:
            if r.method == method and r.score is not None:
                at[r.length, r.about["depth"]].append(100 * r.score)
        grid = [[_mean(at.get((length, depth), [])) for length in lengths] for depth in depths]
        image = panel.imshow(grid, vmin=0, vmax=100, cmap=MAP, aspect="auto")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if value == value:
                    panel.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=_on(value))
        panel.set_title(method, fontsize=8)
        panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for panel in figure.axes[len(methods) :]:
        panel.remove()
    figure.axes[0].set_ylabel("needle's depth in the text")
    figure.supxlabel("prompt tokens", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=figure.axes, label="found, %")
    return figure


def _on(value: float) -> str:
    """The colour of a number on its field of the map."""
    return "#ffffff" if value < 55 else "#000000"


def lines(results: Sequence[Result], label: str) -> Figure:
    """One line for each method against prompt length, with its interval."""
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(r.method for r in results))
    look = _look(methods)
    for place, method in enumerate(methods):
        own = [r for r in results if r.method == method]
        lengths = sorted({r.length for r in own})
        cells = [_cell([r for r in own if r.length == length]) for length in lengths]
        aside = 1.02 ** (place - (len(methods) - 1) / 2)  # intervals beside each other
        _intervals(axes, [length * aside for length in lengths], cells, method, look(method), line=True)
    axes.set_xscale("log", base=2)
    ticks = sorted({r.length for r in results})
    axes.set_xticks(ticks, [_short(length) for length in ticks])
    axes.minorticks_off()
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel(label)
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3)
    return figure


def bars(results: Sequence[Result], label: str) -> Figure:
    """A bar for each method, with its interval: for results of one length."""
    methods = list(dict.fromkeys(r.method for r in results))
    figure = Figure(figsize=(4.8, 1.0 + 0.36 * len(methods)), layout="constrained")
    axes = figure.subplots()
    look = _look(methods)
    for place, method in enumerate(methods):
        cell = _cell([r for r in results if r.method == method])
        error = [[max(cell.value - cell.low, 0)], [max(cell.high - cell.value, 0)]]
        axes.barh(place, cell.value, color=look(method)[0], height=0.6, alpha=0.8)
        axes.errorbar(cell.value, place, xerr=error, color="#444444", capsize=3, lw=1.2)
        at = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(f"{cell.value:.1f}", (cell.high, place), **at)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    (length,) = {r.length for r in results}
    axes.set_xlabel(f"{label}, {_short(length)} tokens")
    axes.grid(axis="x", alpha=0.3)
    return figure


def difference_plot(found: Sequence[Difference]) -> Figure:
    """Differences from dense attention on the same prompts, with intervals; what touches the line may be none."""
    methods = list(dict.fromkeys(one.method for one in found))
    places = list(dict.fromkeys((one.task, one.length) for one in found))
    look = _look(methods)
    figure = Figure(figsize=(4.8, 1.2 + len(places) * (0.16 + 0.16 * len(methods))), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#000000", lw=1)
    for number, method in enumerate(methods):
        own = [one for one in found if one.method == method]
        aside = 0.7 * ((number + 0.5) / len(methods) - 0.5)
        rows = [places.index((one.task, one.length)) + aside for one in own]
        values = [one.value for one in own]
        # The interval of scores is drawn towards 0, so it need not lie around its mean.
        error = [
            [max(one.value - one.low, 0) for one in own],
            [max(one.high - one.value, 0) for one in own],
        ]
        colour, marker = look(method)
        axes.errorbar(values, rows, xerr=error, fmt=marker, ms=4, lw=1.2, capsize=2, color=colour, label=method)
    axes.set_yticks(range(len(places)), [f"{task}, {_short(length)}" for task, length in places], fontsize=8)
    axes.set_ylim(len(places) - 0.5, -0.5)
    likelihood = found[0].likelihood
    axes.set_xlabel("perplexity above dense's, % (right is worse)" if likelihood else "score minus dense's, points")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return figure


def _intervals(axes, places, cells, label, look, *, line):
    colour, marker = look
    values = [cell.value for cell in cells]
    error = [[max(c.value - c.low, 0) for c in cells], [max(c.high - c.value, 0) for c in cells]]
    style = "-" if line else ""
    axes.errorbar(places, values, yerr=error, fmt=marker + style, ms=4, lw=1.4, capsize=2, color=colour, label=label)


def _cell(results: list[Result]) -> Cell:
    cell = score_cell(results) or perplexity_cell(results)
    assert cell is not None
    return cell


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
