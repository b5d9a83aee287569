"""A comparison as one HTML page: verdict, figures with their bounds, layer by layer, replies side by side, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minference_jax.compare.comparison import Comparison
from minference_jax.compare.report import figure_rows, name_of_ours
from minference_jax.compare.task import TaskComparison
from minference_jax.eval.metrics import wilson
from minference_jax.viz.figure import has_matplotlib, new_figure
from minference_jax.viz.page import NO_PICTURES, Page, to_svg


def comparison_page(
    comparison: Comparison,
    run: Mapping[str, Any],
    *,
    replies: Sequence[Mapping[str, str]] = (),
    task: TaskComparison | None = None,
) -> str:
    """The page. `run`: what more to say of the run, such as its command. `replies`: texts of both sides, by side."""
    c = comparison
    page = Page(f"{c.model}: JAX against PyTorch")
    page.text("Within tolerance." if c.within_tolerance else "Outside tolerance: " + "; ".join(c.failures) + ".")
    facts = {"dtype": c.dtype, "patterns of JAX": c.patterns or "dense", "tokens": f"{c.tokens:,}"}
    facts |= {"layers and logits at": f"{c.positions:,} positions"}
    versions = ", ".join(f"{name} {version}" for name, version in c.versions.items())
    page.facts(facts | {"versions": versions} | {name: one for name, one in run.items() if name != "versions"})
    if not has_matplotlib():
        page.text(NO_PICTURES[0].upper() + NO_PICTURES[1:] + ".")
    if task is not None:
        page.heading(f"{task.task}, {task.length:,} tokens")
        page.table(["", "score, %", "95 % interval"], [_score(*one) for one in _sides(task)])
        page.text(f"{100 * task.same_replies:.0f} % of {len(task.scores_ours)} replies are the same, token for token.")
    page.heading("Logits and tokens")
    page.table(["figure", "value", "bound"], figure_rows(c))
    if c.layers:
        page.heading("Layer by layer")
        page.text(
            "How far the hidden states after each layer are from PyTorch's: the root mean square of the difference "
            "and the largest one, as shares of the root mean square of PyTorch's."
        )
        if has_matplotlib():
            page.pictures([to_svg(layer_plot(c))])
        rows = [[x.name, f"{x.max:.2e}", f"{x.rms:.2e}", f"{x.scale:.3g}"] for x in c.layers]
        page.table(["after", "max |difference|", "RMS difference", "RMS of PyTorch's"], rows, folded="In numbers")
    shown = _task_replies(task) if task is not None else [(dict(texts), "") for texts in replies]
    if shown:
        page.heading("Replies side by side")
        page.text("What is marked parts from PyTorch's.")
        for texts, right in shown:
            page.replies(texts, right)
    page.heading("Times")
    steps = [step for step in ("load", "compile", "prefill", "decode") if step in c.seconds_ours | c.seconds_torch]
    sides = (("PyTorch", c.seconds_torch), (name_of_ours(c), c.seconds_ours))
    table = [[name, *(f"{s[step]:.2f}" if step in s else "" for step in steps)] for name, s in sides]
    page.table(["seconds", *steps], table)
    return page.html()


def layer_plot(comparison: Comparison) -> Any:
    """Relative differences after each layer, on a logarithmic scale. Needs matplotlib."""
    figure = new_figure(4.8, 3.2)
    axes = figure.subplots()
    layers = comparison.layers
    for label, colour, marker, values in (
        ("root mean square", "#0072b2", "o", [x.rms / (x.scale or 1) for x in layers]),
        ("largest", "#d55e00", "^", [x.max / (x.scale or 1) for x in layers]),
    ):
        points = [(place, value) for place, value in enumerate(values) if value > 0]
        axes.plot(
            *zip(*points, strict=True), marker=marker, ms=3.5, lw=1.2, color=colour, label=label
        ) if points else ()
    if any(x.max > 0 for x in layers):
        axes.set_yscale("log")
    step = max(1, -(-len(layers) // 8))
    places = [*range(0, len(layers) - 1, step), len(layers) - 1]
    axes.set_xticks(
        places, [layers[i].name.removeprefix("layer ") for i in places], fontsize=8, rotation=30, ha="right"
    )
    axes.set_xlabel("after layer")
    axes.set_ylabel("difference, share of PyTorch's RMS", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _sides(task: TaskComparison) -> list[tuple[str, tuple[float, ...]]]:
    return [("PyTorch", task.scores_torch), ("JAX", task.scores_ours)]


def _score(name: str, scores: Sequence[float]) -> list[str]:
    mean = sum(scores) / len(scores)
    low, high = wilson(mean, len(scores))
    return [name, f"{100 * mean:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]


def _task_replies(task: TaskComparison, most: int = 12) -> list[tuple[dict[str, str], str]]:
    """Those that differ come first."""
    both = list(zip(task.replies_torch, task.replies_ours, task.answers, strict=True))
    both.sort(key=lambda one: one[0] == one[1])
    return [({"PyTorch": theirs, "JAX": ours}, " | ".join(right)) for theirs, ours, right in both[:most]]
