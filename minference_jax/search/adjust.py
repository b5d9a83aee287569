"""Equal cost: each head's budgets of a candidate scaled until its plan, on the sample itself, costs the target.

Source: MInference (arXiv 2407.02490) §3.2, Algorithm 1 ("ChangeSpace"). There FLOPs are counted from the budgets;
here a head's real plan is made and its visited keys are counted, because overlap and clustering decide what is visited.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STEPS, OCTAVES = 9, 9.0
"""Bisections of a range of 2⁹ around the first guess: the factor is found to 1.4 %."""


def adjust(cost_of: Callable[[np.ndarray], np.ndarray], target: float, guess: float, heads: int) -> np.ndarray:
    """For each head, the largest factor on its budgets at which it costs at most `target`, by bisection.

    **Arguments:**

    - `cost_of(factors)`: float64 `[n]` to `[n]`, the cost of each head at its own factor; it must grow with the factor.
    - `guess`: the middle of the range that is searched, from guess / 2^4.5 to guess · 2^4.5.

    **Returns:** float64 `[n]`, to within 1.4 %. A head that costs too much even at the smallest factor gets that.
    """
    low = np.full(heads, np.log2(guess) - OCTAVES / 2)
    high = low + OCTAVES
    for _ in range(STEPS):
        middle = (low + high) / 2
        fits = cost_of(np.exp2(middle)) <= target
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return np.exp2(low)
