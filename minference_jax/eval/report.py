"""Results as tables in Markdown, and as one HTML page with its plots."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from minference_jax.eval.results import Cell, Result, mean_density, perplexity_cell, score_cell, unlike_densities
from minference_jax.eval.tasks import GROUPS
from minference_jax.runs.files import naming

NOTE = (
    "Scores are percentages with Wilson's 95 % interval, perplexity has the interval that its windows' spread gives. "
    "Density is the visited share of the causal query-key pairs, mean over layers, heads and prompts; that of a "
    "cell's own prompts follows its interval where it is not 1."
)


class Table:
    """A title, a header and rows of texts."""

    def __init__(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]):
        self.title, self.header, self.rows = title, list(header), [list(row) for row in rows]

    def markdown(self) -> str:
        """A heading and a pipe table."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""])

    def html(self) -> str:
        """A heading and a table element."""
        head = "".join(f"<th>{html.escape(text)}</th>" for text in self.header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in self.rows)
        return f"<h3>{html.escape(self.title)}</h3><table><tr>{head}</tr>{body}</table>"


def tables(results: Sequence[Result]) -> list[Table]:
    """First the averages: a row for each method, a column for each group of tasks at each length. Then each task."""
    lengths, methods = _distinct(r.length for r in results), _distinct(r.method for r in results)
    tasks = _distinct(r.task for r in results)
    groups = {name: [task for task in tasks if task in members] for name, members in GROUPS.items()}
    groups = {name: members for name, members in groups.items() if len(members) > 1}
    rest = [task for task in tasks if not any(task in members for members in groups.values())]
    columns = {f"{name} ({len(members)} tasks)": members for name, members in groups.items()}
    columns |= {task: [task] for task in rest}
    found = []
    for length in lengths:
        rows = []
        for method in methods:
            cells = [_group_cell(results, method, length, members) for members in columns.values()]
            rows.append([method, _density(_pick(results, method, length)), *map(_text, cells)])
        found.append(Table(f"{length:,} tokens", ["method", "density", *columns], rows))
    for members in groups.values():
        found += [
            Table(
                task,
                ["method", *(f"{length:,}" for length in lengths)],
                [
                    [method, *(_text(_cell(_pick(results, method, length, [task]))) for length in lengths)]
                    for method in methods
                ],
            )
            for task in members
        ]
    return found


def markdown(results: Sequence[Result], title: str = "Evaluation") -> str:
    """The report as Markdown."""
    notes = [line for text in (NOTE, *unlike_densities(results)) for line in (text, "")]
    return "\n".join([f"## {title}", "", *notes, *(table.markdown() for table in tables(results))])


def html_page(results: Sequence[Result], title: str = "Evaluation", plots: Sequence[str] = ()) -> str:
    """The report as one page; `plots` are SVG elements."""
    style = "body{font:14px sans-serif;margin:2em;max-width:80em}td,th{padding:.2em .8em;text-align:right}"
    style += "td:first-child{text-align:left}tr:nth-child(even){background:#f2f2f2}table{border-collapse:collapse}"
    notes = (f"<p>{html.escape(text)}</p>" for text in (NOTE, *unlike_densities(results)))
    parts = [f"<h1>{html.escape(title)}</h1>", *notes, *plots]
    parts += [table.html() for table in tables(results)]
    return f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{style}</style>" + "".join(
        parts
    )


def write_report(results: Sequence[Result], directory: str | Path, title: str = "Evaluation") -> list[Path]:
    """Writes `report.md`, `report.html` and, where matplotlib is installed, one SVG file for each plot."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        from minference_jax.eval.plots import figures, to_svg
    except ImportError:
        plots = {}
    else:
        plots = {name: to_svg(figure) for name, figure in figures(results).items()}
    texts = {f"{name}.svg": svg for name, svg in plots.items()}
    texts |= {"report.md": markdown(results, title), "report.html": html_page(results, title, list(plots.values()))}
    for name, text in texts.items():
        with naming(directory / name):
            (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in texts]


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _pick(results: Sequence[Result], method: str, length: int, tasks: Sequence[str] | None = None) -> list[Result]:
    return [
        result
        for result in results
        if result.method == method and result.length == length and (tasks is None or result.task in tasks)
    ]


def _cell(results: list[Result]) -> Cell | None:
    return score_cell(results) or perplexity_cell(results)


def _group_cell(results: Sequence[Result], method: str, length: int, tasks: Sequence[str]) -> Cell | None:
    """None too where a task is missing, as in a run that was stopped: an average of other tasks is no comparison."""
    found = _pick(results, method, length, tasks)
    return _cell(found) if {result.task for result in found} == set(tasks) else None


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "—"
    digits = 1 if cell.high > 50 or cell.low == 0 else 2
    density = "" if cell.density in (None, 1) else f" at {cell.density:.3f}"
    return f"{cell.value:.{digits}f} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]{density}"


def _density(results: list[Result]) -> str:
    density = mean_density(results)
    return "—" if density is None else f"{density:.3f}"
