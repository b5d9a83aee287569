"""Results as tables: averages over groups of tasks, and each task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from minference_jax.eval.results import Cell, Result, mean_density, perplexity_cell, score_cell
from minference_jax.eval.tasks import GROUPS

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
