"""How much a method differs from dense attention on the same prompts, and how sure that is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from minference_jax.eval.results import Result


@dataclasses.dataclass(frozen=True)
class Difference:
    """A method's mean score minus dense attention's, in percentage points; of text, by how many percent its perplexity
    is higher. With a 95 % interval, over `count` prompts of both."""

    method: str
    task: str
    length: int
    value: float
    low: float
    high: float
    count: int
    likelihood: bool = False


def differences(results: Sequence[Result], baseline: str = "dense") -> list[Difference]:
    """For every method but the baseline, task and length that both have prompts of, in the order of the results."""
    cells: dict[tuple[str, str, int], dict[int, Result]] = {}
    for result in results:
        cells.setdefault((result.method, result.task, result.length), {})[result.index] = result
    found = []
    for (method, task, length), own in cells.items():
        other = cells.get((baseline, task, length), {})
        pairs = [(own[index], other[index]) for index in own if index in other]
        if method == baseline or not pairs:
            continue
        scores = [a.score - b.score for a, b in pairs if a.score is not None and b.score is not None]
        losses = [a.nll - b.nll for a, b in pairs if a.nll is not None and b.nll is not None]
        if scores:
            value, low, high = (100 * x for x in of_scores(scores))
            found.append(Difference(method, task, length, value, low, high, len(scores)))
        elif len(losses) > 1:
            value, low, high = (100 * math.expm1(x) for x in of_losses(losses))
            found.append(Difference(method, task, length, value, low, high, len(losses), likelihood=True))
    return found


def of_scores(changes: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired changes of scores in [0, 1], and its interval.

    The interval is that of Agresti and Min (2005) for paired proportions: half a pair is added to each of the four
    cells (right or wrong by either). So no change in a few prompts is no proof of no change.
    """
    count, total, squares = len(changes) + 2, sum(changes), sum(x * x for x in changes) + 1
    centre = total / count
    half = 1.96 * math.sqrt(max(squares - total * total / count, 0.0)) / count
    return total / len(changes), max(centre - half, -1.0), min(centre + half, 1.0)


def of_losses(changes: Sequence[float]) -> tuple[float, float, float]:
    """Mean of two or more paired changes, and the interval that their spread gives."""
    mean = sum(changes) / len(changes)
    spread = math.sqrt(sum((x - mean) ** 2 for x in changes) / (len(changes) - 1) / len(changes))
    return mean, mean - 1.96 * spread, mean + 1.96 * spread
