"""What patterns gain in time against what they lose in answers, as JSON and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minference_jax.bench.operator import OperatorRow
from minference_jax.bench.tradeoff_points import SAME, Point, kind_of_inputs, sort_points
from minference_jax.eval.results import Run
from minference_jax.extras import naming_extra

if TYPE_CHECKING:
    from rich.table import Table


KEPT = ("lengths", "samples", "density", "date", "device", "versions")
"""What is kept of each evaluation: no paths, as its command has, for the file is made to be shown."""


def to_json(
    points: Sequence[Point], runs: Sequence[Run], rows: Sequence[OperatorRow], environments: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The points under what they were measured with. Raises `ValueError` for times of different devices."""
    devices = list(dict.fromkeys(one.get("device", "unknown") for one in environments))
    if len(devices) > 1:
        raise ValueError(f"operator: times of different devices do not compare: {', '.join(devices)}")
    environment = {
        name: ", ".join(dict.fromkeys(str(one[name]) for one in environments if name in one))
        for name in dict.fromkeys(name for one in environments for name in one)
    }
    facts: dict[str, Any] = {}
    for run in runs:
        facts |= {name: run.settings[name] for name in SAME if name in run.settings}
    told = [{**run.settings, **run.about} for run in runs]
    models = dict.fromkeys(str(run.about["model"]) for run in runs if "model" in run.about)
    return {
        "environment": environment,
        "inputs": ", ".join(sorted({kind_of_inputs(row) for row in rows})),
        "model": ", ".join(models),
        "settings": facts,
        "evaluations": [{name: known[name] for name in KEPT if name in known} for known in told],
        "rows": [dataclasses.asdict(point) for point in points],
    }


COUNTS = ("tokens", "tasks", "prompts")
RANGES = {"ruler_difference": (-100, 100), "standard_error": (0, 100), "speedup": (1e-6, 1e6)}
RANGES |= {"density": (1e-9, 1), "timed_density": (1e-9, 1)}


def from_json(found: Mapping[str, Any]) -> list[Point]:
    """The points of what `to_json` gave. Raises `ValueError` naming the row and what is wrong with it."""
    points = []
    for number, fields in enumerate(found["rows"], 1):
        try:
            point = Point(**fields)
            for name in ("method", "pattern"):
                if not isinstance(getattr(point, name), str):
                    raise ValueError(f"{name} is {getattr(point, name)!r}, no text")
            for name in COUNTS:
                if not isinstance(getattr(point, name), int) or getattr(point, name) < 1:
                    raise ValueError(f"{name} is {getattr(point, name)!r}, no whole number from 1 on")
            for name, (low, high) in RANGES.items():
                value = getattr(point, name)
                if not isinstance(value, int | float) or not low <= value <= high:
                    raise ValueError(f"{name} is {value!r}, not between {low:g} and {high:g}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {number} is no point of bench tradeoff: {error}") from None
        points.append(point)
    if not points:
        raise ValueError("there are no points to draw")
    return sort_points(points)


def table(points: Sequence[Point], facts: Mapping[str, Any]) -> Table:
    """The points as a rich table, under the facts of where they were timed."""
    with naming_extra("a table"):
        from rich.table import Table

    shown = Table(title=" ".join(f"{name}={value}" for name, value in facts.items()))
    titles = ("tokens", "method", "pattern", "density", "timed at", "speed-up", "RULER, points", "tasks", "prompts")
    for title in titles:
        shown.add_column(title, justify="left" if title in ("method", "pattern") else "right")
    for p in points:
        lost = f"{p.ruler_difference:+.1f} ± {p.standard_error:.1f}"
        first = (f"{p.tokens:,}", p.method, p.pattern, f"{p.density:.3f}", f"{p.timed_density:.3f}")
        shown.add_row(*first, f"{p.speedup:.2f}", lost, str(p.tasks), str(p.prompts))
    return shown
