"""What a pattern costs: the visited keys of the real kernel, or seconds measured on this device; and the target."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minference_jax.attention import sparse_attention
from minference_jax.patterns import AShape, Pattern, layer_patterns
from minference_jax.search.candidates import PAPER_TARGET

PAPER_TOKENS = 32_768
"""About the length of the prompt that the original searched on (30K)."""

REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Latency:
    """A target of so many milliseconds for one layer's attention, index included; needs `cost="measured"`."""

    milliseconds: float

    def __post_init__(self) -> None:
        if not 0 < self.milliseconds < float("inf"):
            raise ValueError(f"Latency: milliseconds must be positive, got {self.milliseconds}")


Target = Pattern | float | Latency | None
CostKind = Literal["visited", "measured"]


@dataclasses.dataclass(frozen=True)
class CostModel:
    """What a layer costs whose heads all follow one candidate c and have the mean density d: `fixed[c] + slope[c] · d`.

    With `cost="visited"` that is d itself, the share of causal cells that the kernel visits; with `"measured"`,
    seconds.
    """

    fixed: tuple[float, ...]
    slope: tuple[float, ...]

    @classmethod
    def visited(cls, candidates: int) -> CostModel:
        """Cost is density."""
        return cls((0.0,) * candidates, (1.0,) * candidates)

    def of(self, candidate: int, density: np.ndarray) -> np.ndarray:
        """Cost of heads at these densities, as if the whole layer were like each of them."""
        return self.fixed[candidate] + self.slope[candidate] * density


def default_target(tokens: int) -> AShape:
    """1,024 sinks and a window of 4,096; for samples shorter than 32K tokens, in proportion, so as not to be dense."""
    size = min(1.0, tokens / PAPER_TOKENS)
    return AShape(max(1, round(PAPER_TARGET.sink * size)), max(1, round(PAPER_TARGET.window * size)))


def check_target(target: Target, cost: str) -> None:
    """Raises ValueError or TypeError for a target that is none, or does not go with the kind of cost."""
    if cost not in ("visited", "measured"):
        raise ValueError(f"cost must be 'visited' or 'measured', got {cost!r}")
    if isinstance(target, Latency):
        if cost != "measured":
            raise ValueError("a latency target needs cost='measured'")
    elif isinstance(target, int | float):
        if not 0 < target < 1:
            raise ValueError(f"target: a density must lie between 0 and 1, got {target}")
        if cost == "measured":
            raise ValueError("with cost='measured' the target is a time: an AShape's, or a Latency")
    elif target is not None and (not isinstance(target, Pattern) or target.indexed):
        raise TypeError(f"target must be an AShape, a density, a Latency or None, got {target!r}")


def target_density(target: Target, tokens: int, density_of: Callable[[Pattern], float]) -> float:
    """The target as a density. Raises ValueError where it leaves nothing to choose: an A-shape that is dense here."""
    if isinstance(target, Latency):
        raise TypeError("a latency is no density")
    if isinstance(target, int | float):
        return target
    pattern = default_target(tokens) if target is None else target
    density = density_of(pattern)
    if density > 0.95:
        raise ValueError(
            f"target {pattern} visits {density:.0%} of the causal cells of {tokens} tokens, which leaves nothing to"
            " search; give a density such as 0.25, or longer samples"
        )
    return density


def measure(
    qkv: tuple[Array, Array, Array],
    lengths: Array,
    candidates: Sequence[Pattern],
    factors: Sequence[float],
    densities: Callable[[int, float], float],
) -> CostModel:
    """Times index and kernel of each candidate on one layer, at its factor and at twice that, and fits a line.

    `densities(candidate, factor)`: its mean density at that factor.
    """
    fixed, slope = [], []
    for c, (candidate, factor) in enumerate(zip(candidates, factors, strict=True)):
        (d1, t1), (d2, t2) = [
            (densities(c, f), seconds(qkv, lengths, candidate.scaled(f, qkv[1].shape[1]))) for f in (factor, 2 * factor)
        ]
        per_density = max((t2 - t1) / max(d2 - d1, 1e-6), 1e-9)
        slope.append(per_density)
        fixed.append(max(t1 - per_density * d1, 0.0))
    return CostModel(tuple(fixed), tuple(slope))


def seconds(qkv: tuple[Array, Array, Array], lengths: Array, pattern: Pattern) -> float:
    """Median time of one layer's attention, index included, with `pattern` in every head."""
    q, k, v = qkv
    heads = layer_patterns(pattern, q.shape[2])
    run: Any = jax.jit(lambda q, k, v, heads, lengths: sparse_attention(q, k, v, heads, lengths=lengths))
    jax.block_until_ready(run(q, k, v, heads, lengths))
    measured = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(run(q, k, v, heads, lengths))
        measured.append(time.perf_counter() - started)
    return float(jnp.median(jnp.asarray(measured)))
