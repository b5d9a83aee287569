"""What a pattern gains in time and loses in answers: points from both measurements.

Answers are RULER's, by `eval`, as differences from dense attention on the same prompts. Times are those of the whole
operator, by `bench operator`. Both must be of the same pattern at the same length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

from minference_jax.bench.operator import OperatorRow
from minference_jax.eval.methods import METHODS
from minference_jax.eval.results import UNLIKE, Result, Run, mean_density
from minference_jax.eval.tasks import GROUPS
from minference_jax.patterns.registry import FAMILIES
from minference_jax.patterns.text import format_pattern, is_pattern_text, parse_pattern
from minference_jax.runs.files import differences

TASKS = GROUPS["ruler"]


@dataclasses.dataclass(frozen=True)
class Point:
    """One pattern at one prompt length.

    - `method`: the line that the point is on, by default its pattern's family. `pattern`: what was timed.
    - `density`: visited / causal cells of the prompts that were answered; `timed_density`: of what was timed.
    - `speedup`: time of dense attention over time of the whole operator.
    - `ruler_difference`: score minus dense attention's on the same prompts, in percentage points, mean over `tasks`
      tasks; with its `standard_error`. `prompts`: of each task, at least.
    """

    method: str
    pattern: str
    tokens: int
    density: float
    timed_density: float
    speedup: float
    ruler_difference: float
    standard_error: float
    tasks: int
    prompts: int

    @property
    def unlike(self) -> bool:
        """Whether what was timed visits another share than what was answered, by more than a tenth."""
        return _ratio(self.density, self.timed_density) > UNLIKE


class Timed(NamedTuple):
    """Times of one pattern at one length, of one array or of several layers of a model."""

    pattern: str
    tokens: int
    density: float
    speedup: float


def make_points(runs: Sequence[Run], rows: Sequence[OperatorRow]) -> list[Point]:
    """A point for each method and length of the runs, but for dense attention; by length, method and density.

    **Arguments:**

    - `runs`: results of `eval`, such as one run for each density. Dense attention may be in one of them only: all have
      the same model, seed and tasks, and so the same prompts. Tasks other than RULER's are left out.
    - `rows`: of `bench operator`, on inputs of one kind. Rows of several layers of a model are added up.

    A method that is a pattern's text has the time of that very pattern. One that is the name of a family, and got its
    budgets from a density (`--methods a-shape --density 0.2`), has that of the family's pattern with the nearest
    density, if it is within a tenth.

    The standard error is that of a mean over tasks: √(Σ variance / prompts) / tasks, of paired differences.

    **Raises:** ValueError that names what is missing or does not fit: dense attention, tasks, prompts, times.
    """
    _check_alike(runs)
    timed = _timed(rows)
    answers: dict[tuple[str, Any, int], dict[tuple[str, int], Result]] = {}
    for run in runs:
        for result in run.results:
            if result.task in TASKS and result.score is not None:
                # Only budgets that come from a density differ between runs of the same method.
                density = run.settings.get("density") if result.method in METHODS else None
                where = result.method, None if result.method == "dense" else density, result.length
                answers.setdefault(where, {}).setdefault((result.task, result.index), result)
    if not any(method == "dense" for method, _, _ in answers):
        found = ", ".join(dict.fromkeys(method for method, _, _ in answers)) or "no RULER task"
        raise ValueError(f"results: dense attention has no RULER scores to compare with; there is {found}")
    points, missing = [], []
    for (method, _, length), own in answers.items():
        if method == "dense":
            continue
        dense = answers.get(("dense", None, length))
        if dense is None:
            raise ValueError(f"results: dense attention has no RULER scores at {length:,} tokens; {method} has")
        lost = _paired(f"{method} at {length:,} tokens", own, dense)
        density = mean_density(list(own.values()))
        if density is None:
            raise ValueError(f"results: {method} at {length:,} tokens has no density")
        found = _time_of(method, length, density, timed)
        if found is None:
            missing.append(f"{method} ({density:.3f}) at {length:,}")
        else:
            line = found.pattern.partition(":")[0] if is_pattern_text(found.pattern) else method
            points.append(Point(line, found.pattern, length, density, found.density, found.speedup, *lost))
    if missing:
        there = ", ".join(f"{one.pattern} ({one.density:.3f}) at {one.tokens:,}" for one in timed) or "none"
        raise ValueError(f"operator: no times of {', '.join(missing)} tokens; there are {there}")
    return sort_points(points)


def sort_points(points: Iterable[Point]) -> list[Point]:
    """By length, method (in the order in which they come) and density."""
    points = list(points)
    order = list(dict.fromkeys(point.method for point in points))
    return sorted(points, key=lambda point: (point.tokens, order.index(point.method), point.density))


def _check_alike(runs: Sequence[Run]) -> None:
    """Raises `ValueError` unless all runs are of the same prompts, read by the same model."""
    known: dict[str, Any] = {}
    for run in runs:
        own = {name: run.settings[name] for name in SAME if name in run.settings}
        own |= {task: digest for task, digest in dict(run.settings.get("tasks", {})).items() if task in TASKS}
        shared = known.keys() & own.keys()
        if wrong := differences({name: known[name] for name in shared}, {name: own[name] for name in shared}):
            raise ValueError(f"results of different models or prompts: {wrong}")
        known |= own


SAME = ("model", "weights", "dtype", "tokenizer", "seed")
"""Settings of a run that decide what dense attention answers."""


def _paired(
    what: str, own: Mapping[tuple[str, int], Result], dense: Mapping[tuple[str, int], Result]
) -> tuple[float, float, int, int]:
    """Mean over tasks of the differences in points, its standard error, tasks, and prompts of the task with fewest."""
    tasks = sorted({task for task, _ in dense})
    changes: dict[str, list[float]] = {task: [] for task in tasks}
    for key in own.keys() & dense.keys():
        one, other = own[key], dense[key]
        if one.answers != other.answers:
            raise ValueError(f"results: prompt {key[1]} of {key[0]} is not the same for dense and {what}")
        if one.score is not None and other.score is not None:
            changes[key[0]].append(100 * (one.score - other.score))
    if few := [f"{task} ({len(found)})" for task, found in changes.items() if len(found) < 2]:
        raise ValueError(f"results: {what} shares fewer than two prompts with dense in {', '.join(few)}")
    error = math.sqrt(sum(variance(found) / len(found) for found in changes.values())) / len(tasks)
    return fmean(fmean(found) for found in changes.values()), error, len(tasks), min(map(len, changes.values()))


def _timed(rows: Sequence[OperatorRow]) -> list[Timed]:
    """One for each pattern and length: rows of several layers count by their sums."""
    kinds = sorted({kind_of_inputs(row) for row in rows})
    if len(kinds) > 1:
        raise ValueError(f"operator: times on different inputs do not compare: {'; '.join(kinds)}")
    groups: dict[tuple[str, int], list[OperatorRow]] = {}
    for row in rows:
        groups.setdefault((_text(row.pattern), row.length), []).append(row)
    return [
        Timed(
            pattern,
            length,
            fmean(row.density for row in own),
            sum(row.dense_ms for row in own) / sum(row.whole_ms for row in own),
        )
        for (pattern, length), own in groups.items()
    ]


def kind_of_inputs(row: OperatorRow) -> str:
    """What was timed, whichever layer of a model it is."""
    return row.inputs.partition(", layer ")[0]


def _time_of(method: str, length: int, density: float, timed: Sequence[Timed]) -> Timed | None:
    """The time of a method of the evaluation, or None."""
    there = [one for one in timed if one.tokens == length]
    if method not in METHODS:
        for one in there:
            if one.pattern == _text(method):
                return one
    near = [one for one in there if one.pattern.partition(":")[0] == method]
    best = min(near, key=lambda one: _ratio(one.density, density), default=None)
    return None if best is None or _ratio(best.density, density) > UNLIKE else best


def _ratio(one: float, other: float) -> float:
    """Of two densities, the larger over the smaller."""
    return max(one, other) / min(one, other)


def _text(name: str) -> str:
    """A pattern's text as `bench operator` writes it; any other name as it is."""
    if name.partition(":")[0] not in FAMILIES:
        return name
    return format_pattern(parse_pattern(name))
