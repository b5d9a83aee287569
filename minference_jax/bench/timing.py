"""Wall-clock times of functions whose results are computed on a device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

TURN_SECONDS = 0.25


def median_ms(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median milliseconds of single calls of `run`, after one warm-up; waits for the device."""
    return 1e3 * median_seconds(run, repeats, long=math.inf)


def median_seconds(run: Callable[[], Any], repeats: int, *, long: float = 3.0) -> float:
    """Median wall-clock seconds of `run` after a warm-up, waiting for the device; of the first run if it is long."""
    times = []
    for _ in range(1 + repeats):
        times.append(1e-3 * _turn(run, 1))
        if times[0] > long:
            break
    return statistics.median(times[1:] or times)


def in_turns_ms(runs: Sequence[Callable[[], Any]], turns: int = 5, seconds: float = TURN_SECONDS) -> list[float]:
    """Milliseconds that a call of each of `runs` takes among calls of its kind, to be compared with each other.

    A GPU at its power limit slows down by a tenth within a tenth of a second of work: after a pause a short function is
    faster than a long one. So the functions take turns, and one turn calls one function over and over, `seconds` long
    or once. Two calls at most are queued.

    **Arguments:** `turns`: of each function, of which the median is taken.
    """
    calls = []
    for run in runs:
        jax.block_until_ready(run())
        calls.append(max(1, math.ceil(1e3 * seconds / _turn(run, 1))))
    rounds = [[_turn(run, n) for run, n in zip(runs, calls, strict=True)] for _ in range(turns)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _turn(run: Callable[[], Any], calls: int) -> float:
    """Milliseconds that each of `calls` calls in a row takes."""
    start = time.perf_counter()
    result = run()
    for _ in range(calls - 1):
        following = run()
        jax.block_until_ready(result)
        result = following
    jax.block_until_ready(result)
    return 1e3 * (time.perf_counter() - start) / calls
