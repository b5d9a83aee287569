"""An evaluation as one HTML page: what was run, what came out and how sure it is, and replies beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from minference_jax.eval.paired import differences
from minference_jax.eval.results import Result, unlike_densities
from minference_jax.eval.tables import NOTE, tables
from minference_jax.viz.page import NO_PICTURES, Page

EXAMPLES = 12
"""Prompts whose replies are shown, at most."""

DIFFERENCES = (
    "On the same prompts, so that what they share does not blur the comparison; with a 95 % interval. An interval that "
    "holds 0 shows no difference, and the fewer the prompts, the less that says."
)


def html_page(results: Sequence[Result], title: str, pictures: Mapping[str, str], run: Mapping[str, Any]) -> str:
    """The page. `pictures`: name → SVG, as `plots.figures` names them; `run`: names and values of what was run."""
    page = Page(title)
    page.facts(_run_facts(run, results))
    for text in (NOTE, *unlike_densities(results)):
        page.text(text)
    if not pictures:
        page.text(NO_PICTURES[0].upper() + NO_PICTURES[1:] + ".")
    found, lengths = tables(results), len({r.length for r in results})
    page.heading("Scores")
    page.pictures([svg for name, svg in pictures.items() if not name.startswith(("needle", "difference"))])
    for table in found[:lengths]:
        page.heading(table.title, 3)
        page.table(table.header, table.rows)
    if changed := differences(results):
        page.heading("Differences from dense attention")
        page.text(DIFFERENCES)
        page.pictures([svg for name, svg in pictures.items() if name.startswith("difference")])
        header = ["method", "task", "tokens", "difference", "95 % interval", "prompts"]
        page.table(
            header,
            [
                [
                    *(one.method, one.task, f"{one.length:,}"),
                    f"{one.value:+.1f} {'% perplexity' if one.likelihood else 'points'}",
                    f"{one.low:+.1f} to {one.high:+.1f}",
                    f"{one.count:,}",
                ]
                for one in changed
            ],
            folded="In numbers" if pictures else "",
        )
    if "needle" in pictures:
        page.heading("Where needles are found")
        page.pictures([pictures["needle"]])
    if len(found) > lengths:
        page.heading("Each task")
        for table in found[lengths:]:
            page.heading(table.title, 3)
            page.table(table.header, table.rows)
    _examples(page, results)
    _times(page, results)
    return page.html()


def _run_facts(run: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """What was run, in words: dictionaries in one line, hashes of content cut."""
    facts = {"results": f"{len(results):,}"}
    for name, value in run.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {_short(one)}" for key, one in value.items())
        elif isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        facts[str(name)] = _short(value)
    return facts


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text) else text


def _examples(page: Page, results: Sequence[Result]) -> None:
    """Replies of all methods to the same prompts: first where their scores differ, most of all; some of each task."""
    prompts: dict[tuple[str, int, int], dict[str, Result]] = {}
    for result in results:
        if result.score is not None:
            prompts.setdefault((result.task, result.length, result.index), {})[result.method] = result
    prompts = {key: found for key, found in prompts.items() if len(found) > 1}

    def spread(key: tuple[str, int, int]) -> float:
        scores = [one.score or 0.0 for one in prompts[key].values()]
        return max(scores) - min(scores)

    by_task: dict[str, list[tuple[str, int, int]]] = {}
    for key in sorted(prompts, key=spread, reverse=True):
        by_task.setdefault(key[0], []).append(key)
    each = max(2, EXAMPLES // max(len(by_task), 1))
    shown = [key for keys in by_task.values() for key in keys[:each]][:EXAMPLES]
    if not shown:
        return
    page.heading("Replies side by side")
    page.text("Those whose scores differ most. What is marked parts from the first one's reply.")
    for task, length, index in shown:
        found = prompts[task, length, index]
        depth = next(iter(found.values())).about.get("depth")
        where = f", needle at {depth:.0%}" if isinstance(depth, float) else ""
        page.heading(f"{task}, {length:,} tokens, prompt {index}{where}", 3)
        first = sorted(found.values(), key=lambda one: one.method != "dense")
        right = " | ".join(dict.fromkeys(first[0].answers))
        page.replies({f"{one.method}: {100 * (one.score or 0):.0f}": one.reply for one in first}, right)


def _times(page: Page, results: Sequence[Result]) -> None:
    timed: dict[tuple[str, int], list[float]] = {}
    for result in results:
        if result.seconds is not None:
            timed.setdefault((result.method, result.length), []).append(result.seconds)
    if not timed:
        return
    page.heading("Times")
    page.text("Seconds of a prompt and its reply, as a share of its batch; the sum has compilation in it too.")
    page.table(
        ["method", "tokens", "median, s", "sum, s"],
        [[m, f"{n:,}", f"{median(seconds):.3g}", f"{sum(seconds):,.1f}"] for (m, n), seconds in timed.items()],
    )
