"""Budgets for a prompt length and a density: all patterns of a model times one factor, measured on a sample prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.index.build import make_plan
from minference_jax.models.capture import capture_qkv
from minference_jax.models.llama import Llama
from minference_jax.patterns import Dense, HeadPatterns, PatternArrays
from minference_jax.search.candidates import scaled
from pallas_kernels.plan import num_key_tiles

STEPS, OCTAVES = 10, 10
"""Bisections, and the range of factors in powers of two, around 1: the factor is found to 0.7 %."""

QKV = tuple[Array, Array, Array]


def scale_to_density(
    model: Llama,
    tokens: Int[Array, "b t"],
    patterns: HeadPatterns,
    density: float,
    *,
    lengths: Int[Array, " b"] | None = None,
) -> HeadPatterns:
    """`patterns` with all budgets times one factor, the largest that keeps to `density` (visited / causal cells).

    What a pattern visits is measured, as the mean over layers, heads and samples, because overlap and clustering decide
    it. So patterns that were searched at one prompt length serve another: give samples of the length that is wanted.
    Where the smallest budgets visit more already (short prompts), these are the answer. `Dense` heads stay dense.

    Memory: queries and keys of all layers. Raises ValueError for a density that is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    found = [(q, k, v) for q, k, v in capture_qkv(model, tokens, lengths)]
    sizes = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths)
    low, high = -OCTAVES / 2, OCTAVES / 2
    for _ in range(STEPS):
        middle = (low + high) / 2
        fits = mean_density(found, times(patterns, 2.0**middle, tokens.shape[1]), sizes) <= density
        low, high = (middle, high) if fits else (low, middle)
    return times(patterns, 2.0**low, tokens.shape[1])


def times(patterns: HeadPatterns, factor: float, keys: int) -> HeadPatterns:
    """All budgets multiplied, within what a prompt of `keys` tokens can hold; a search's figures are dropped."""
    return HeadPatterns(
        tuple(tuple(p if isinstance(p, Dense) else scaled(p, factor, keys) for p in layer) for layer in patterns)
    )


def mean_density(layers: Sequence[QKV], patterns: HeadPatterns, lengths: Int[Array, " b"]) -> float:
    """Visited / causal cells, mean over layers, heads and samples, of the plans for these queries and keys."""
    every = any_budget(patterns.arrays(), layers[0][1].shape[1])
    found = [np.asarray(_density(q, k, every.layer(i), lengths)) for i, (q, k, _) in enumerate(layers)]
    return float(np.mean(found))


def any_budget(arrays: PatternArrays, keys: int) -> PatternArrays:
    """The arrays with static widths that hold any budget for `keys` keys: one compiled program serves all factors."""
    limits, tiles = arrays.limits, num_key_tiles(keys)
    most = {
        "sink": keys,
        "window": keys,
        "columns": keys,
        "slashes": keys,
        "tiles": tiles,
        "blocks": tiles,
        "floor": keys,
    }
    widths = {name: width if getattr(limits, name) else 0 for name, width in most.items()}
    return dataclasses.replace(arrays, limits=dataclasses.replace(limits, covers=0, **widths))


@jax.jit
def _density(
    q: Float[Array, "b t n h"], k: Float[Array, "b t k h"], heads: PatternArrays, lengths: Int[Array, " b"]
) -> Float[Array, "b n"]:
    plan = make_plan(q, k, heads, lengths=lengths)
    return plan.density(q.shape[1], k.shape[1], lengths=lengths)
