"""Budgets that reach a density on a sample prompt.

`scale_to_density` multiplies all budgets of a model by one factor. `share_among_layers` gives each layer a density of
its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.attention import make_plan
from minference_jax.models.capture import capture_qkv
from minference_jax.models.llama import Llama
from minference_jax.patterns import Dense, HeadPatterns, LayerPatterns, Pattern
from minference_jax.patterns.resolve import Patterns, resolve_patterns
from minference_jax.patterns.text import as_pattern

STEPS, OCTAVES = 10, 10
"""Bisections, and the range of factors in powers of two, around 1: the factor is found to 0.7 %."""

QKV = tuple[Array, Array, Array]


def scale_to_density(
    model: Llama,
    tokens: Int[Array, "b t"],
    patterns: Patterns,
    density: float,
    *,
    lengths: Int[Array, " b"] | None = None,
) -> HeadPatterns:
    """Patterns brought to a density: all budgets times one factor, the largest that keeps to it.

    The density (visited / causal cells) is measured on `tokens`, as the mean over layers, heads and samples: how parts
    of a plan overlap decides it, and no formula knows that. Use it to bring patterns that were searched at one prompt
    length to another: give samples of the wanted length. If the smallest budgets visit more than `density` (short
    prompts), they are the answer. `Dense` heads stay dense.

    **Arguments:** `patterns`: in any form that `Llama.from_pretrained` takes.

    Memory: queries and keys of all layers. Raises ValueError for a density that is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    config = model.config
    found = resolve_patterns(patterns, config.num_layers, config.num_heads)
    if found is None:
        return HeadPatterns.uniform(Dense(), config.num_layers, config.num_heads)
    return _times_factor(_captured(model, tokens, lengths), _sizes(tokens, lengths), found, density)


def share_among_layers(
    model: Llama,
    tokens: Int[Array, "b t"],
    pattern: Pattern | str,
    *,
    lengths: Int[Array, " b"] | None = None,
) -> HeadPatterns:
    """One pattern for all heads of a model, with a density for each layer; their mean is the pattern's density.

    Some layers need more of their cells than others. To find each layer's share, all layers read `tokens` with one
    common threshold on the mean attention weight, chosen so that their mean density is the wanted one. What a layer
    visits then is its density, on other prompts too; which keys it visits depends on the prompt. (A layer's density is
    at most 1, so the mean may be a little lower.)

    **Arguments:** `tokens`: int32 `[b, t]`, samples; `lengths`: int32 `[b]`. `pattern`: one with a density, such as
    `SharedDensity`, or its text.

    **Returns:** `HeadPatterns`.

    **Raises:** TypeError for a pattern of another family. Memory: queries and keys of all layers.
    """
    pattern = as_pattern(pattern)
    density = pattern.share()
    if density is None:
        raise TypeError(f"pattern must have a density, as SharedDensity has; got {pattern!r}")
    found, sizes, config = _captured(model, tokens, lengths), _sizes(tokens, lengths), model.config
    one = pattern.at_threshold(0.5 / tokens.shape[1])
    common = HeadPatterns.uniform(one, config.num_layers, config.num_heads)
    visited = densities(found, _times_factor(found, sizes, common, density), sizes).mean(axis=(1, 2))
    shares = np.minimum(visited * (density / visited.mean()), 1.0)
    return HeadPatterns(tuple((pattern.with_share(float(share)),) * config.num_heads for share in shares))


def _captured(model: Llama, tokens: Int[Array, "b t"], lengths: Int[Array, " b"] | None) -> list[QKV]:
    return [(q, k, v) for q, k, v in capture_qkv(model, tokens, lengths)]


def _sizes(tokens: Int[Array, "b t"], lengths: Int[Array, " b"] | None) -> Int[Array, " b"]:
    return jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths)


def _times_factor(
    layers: Sequence[QKV], lengths: Int[Array, " b"], patterns: HeadPatterns, density: float
) -> HeadPatterns:
    keys = layers[0][1].shape[1]
    low, high = -OCTAVES / 2, OCTAVES / 2
    for _ in range(STEPS):
        middle = (low + high) / 2
        fits = mean_density(layers, times(patterns, 2.0**middle, keys), lengths) <= density
        low, high = (middle, high) if fits else (low, middle)
    return times(patterns, 2.0**low, keys)


def times(patterns: HeadPatterns, factor: float, keys: int) -> HeadPatterns:
    """All budgets multiplied, within what a prompt of `keys` tokens can hold; a search's figures are dropped."""
    return HeadPatterns(tuple(tuple(p if p.dense else p.scaled(factor, keys) for p in layer) for layer in patterns))


def mean_density(layers: Sequence[QKV], patterns: HeadPatterns, lengths: Int[Array, " b"]) -> float:
    """Visited / causal cells, mean over layers, heads and samples, of the plans for these queries and keys."""
    return float(np.mean(densities(layers, patterns, lengths)))


def densities(layers: Sequence[QKV], patterns: HeadPatterns, lengths: Int[Array, " b"]) -> np.ndarray:
    """Visited / causal cells of every layer, sample and head."""
    every = patterns.arrays().widest(layers[0][1].shape[1])
    found, unspent = [], every.begin(layers[0][0].shape[0])
    for index, (q, k, _) in enumerate(layers):
        heads = dataclasses.replace(every.layer(index), unspent=unspent)
        density, unspent = _density(q, k, heads, lengths)
        found.append(density)
    return np.stack(found)


@jax.jit
def _density(
    q: Float[Array, "b t n h"], k: Float[Array, "b t k h"], heads: LayerPatterns, lengths: Int[Array, " b"]
) -> tuple[Float[Array, "b n"], Float[Array, " b"] | None]:
    """Of one layer, and what it leaves to the next."""
    density = make_plan(q, k, heads, lengths=lengths).density(q.shape[1], k.shape[1], lengths=lengths)
    return density, heads.left(density, None)
