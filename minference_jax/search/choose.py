"""From the measured options of every head to one pattern for each: best at equal cost, or budgets where they help most.

Plain NumPy on a few thousand numbers: deterministic, and independent of the device.
"""

from __future__ import annotations

import heapq

import numpy as np
from jaxtyping import Bool, Float, Int


def best_at_equal_cost(
    cost: Float[np.ndarray, "heads options"],
    error: Float[np.ndarray, "heads options"],
    target: float,
    *,
    slack: float = 0.05,
) -> Int[np.ndarray, " heads"]:
    """For each head, the option of least error among those that cost at most `target` · (1 + `slack`).

    **Arguments:** `cost`, `error`: `[heads, options]`.

    **Returns:** int `[heads]`. Of equal errors it is the cheaper option; where no option is cheap enough, the cheapest.
    """
    affordable = cost <= target * (1 + slack)
    affordable |= ~affordable.any(1, keepdims=True) & (cost == cost.min(1, keepdims=True))
    return np.asarray([_first(error[i], cost[i], affordable[i]) for i in range(len(cost))])


def _first(error: np.ndarray, cost: np.ndarray, allowed: Bool[np.ndarray, " options"]) -> int:
    candidates = np.flatnonzero(allowed)
    return int(min(candidates, key=lambda j: (error[j], cost[j], j)))


def allocate(
    cost: Float[np.ndarray, "heads options"], error: Float[np.ndarray, "heads options"], total: float
) -> Int[np.ndarray, " heads"]:
    """One option for each head, so that the sum of the errors is small and the sum of the costs is at most `total`.

    Every head starts with its cheapest option. Then, again and again, the head moves on whose next option lowers the
    error most for what it costs more, as long as that fits. (Options off the lower convex hull of cost and error are
    skipped, so this is what a Lagrangian would give, up to one step of one head.) What is left at the end goes to
    single changes that still fit and help.

    **Arguments:** `cost`, `error`: `[heads, options]`.

    **Returns:** int `[heads]`, the option of each. Where even the cheapest options cost more than `total`, these.
    """
    hulls = [_hull(cost[i], error[i]) for i in range(len(cost))]
    place = [0] * len(hulls)
    spent = sum(float(cost[i, hull[0]]) for i, hull in enumerate(hulls))
    steps: list[tuple[float, int]] = []

    def offer(i: int) -> None:
        if place[i] + 1 < len(hulls[i]):
            a, b = hulls[i][place[i]], hulls[i][place[i] + 1]
            heapq.heappush(steps, (-(error[i, a] - error[i, b]) / (cost[i, b] - cost[i, a]), i))

    for i in range(len(hulls)):
        offer(i)
    while steps:
        _, i = heapq.heappop(steps)
        a, b = hulls[i][place[i]], hulls[i][place[i] + 1]
        if spent + cost[i, b] - cost[i, a] <= total:
            spent += float(cost[i, b] - cost[i, a])
            place[i] += 1
            offer(i)
    chosen = np.asarray([hull[at] for hull, at in zip(hulls, place, strict=True)])
    return _fill(cost, error, chosen, total - spent)


def _hull(cost: np.ndarray, error: np.ndarray) -> list[int]:
    """Options on the lower convex hull of (cost, error), from the cheapest to the one of least error."""
    order = sorted(range(len(cost)), key=lambda j: (cost[j], error[j], j))
    hull: list[int] = []
    for j in order:
        if hull and error[j] >= error[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(cost, error, hull[-2], hull[-1]) >= _slope(cost, error, hull[-2], j):
            hull.pop()
        hull.append(j)
    return hull


def _slope(cost: np.ndarray, error: np.ndarray, a: int, b: int) -> float:
    return (error[b] - error[a]) / max(cost[b] - cost[a], 1e-12)


def _fill(cost: np.ndarray, error: np.ndarray, chosen: np.ndarray, left: float) -> np.ndarray:
    """Spends what is left: the single change that lowers the error most, while there is one that fits."""
    rows = np.arange(len(chosen))
    while True:
        more = cost - cost[rows, chosen][:, None]
        gain = np.where(more <= left, error[rows, chosen][:, None] - error, -np.inf)
        i, j = np.unravel_index(int(np.argmax(gain)), gain.shape)
        if gain[i, j] <= 0:
            return chosen
        left -= more[i, j]
        chosen[i] = j
