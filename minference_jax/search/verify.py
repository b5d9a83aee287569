"""Searched patterns against every candidate given to all heads alike, at equal total visited keys, on held-out text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minference_jax.models import forward
from minference_jax.models.capture import capture_qkv
from minference_jax.models.config import LlamaConfig
from minference_jax.models.llama import Llama
from minference_jax.patterns import HeadPatterns, LayerPatterns, Pattern
from minference_jax.patterns.resolve import Patterns, resolve_patterns
from minference_jax.search.candidates import arrays, check_candidates, default_candidates, factor_at
from minference_jax.search.density import mean_density
from minference_jax.search.measure import QKV
from minference_jax.search.plans import plan_masks, scored_tiles
from minference_jax.search.score import output_errors

QUERY_TILES = 32
"""Query tiles whose rows are scored: twice as many as the search looks at by default."""

TRIES, CLOSE = 6, 1.01
"""Budgets tried before the best is taken, and how much more than wanted is close enough to stop sooner."""


class Row(NamedTuple):
    """What one set of patterns does on one prompt, as means over all layers and heads.

    `error`: of the heads' outputs, relative to dense attention; `worst_error`: of the worst head. `perplexity` is NaN
    where it was not asked for.
    """

    name: str
    density: float
    error: float
    recall: float
    worst_error: float
    perplexity: float


def verify(
    model: Llama,
    tokens: Int[Array, "1 t"],
    patterns: Mapping[str, Patterns],
    *,
    candidates: Sequence[Pattern | str] | None = None,
    perplexity: bool = True,
    say: Callable[[str], None] | None = None,
) -> list[Row]:
    """Searched patterns beside every candidate given to all heads alike, on a prompt that the search has not seen.

    Each candidate's budgets are scaled by one factor for all heads. Its plans for this prompt then visit, in total, at
    least as many keys as those of the first of `patterns`, and at most about 1 % more (or one tile).

    **Arguments:**

    - `tokens`: int32 `[1, t]`, the prompt.
    - `patterns`: name → patterns, in any form that `Llama.from_pretrained` takes. The first one sets the density.
    - `candidates`: patterns or their texts; None: those of the search.
    - `perplexity`: also measure it, which takes a prefill for each.
    - `say`: called with a line for each result.

    **Returns:** a row for dense attention, for each of `patterns`, and for each candidate.

    **Raises:** ValueError for more than one prompt, for dense attention among `patterns`, and for a candidate that
    cannot reach the density.

    Memory: the queries, keys and values of all layers (1 GB for SmolLM2-135M at 8,192 tokens in float32).
    """
    if tokens.ndim != 2 or tokens.shape[0] != 1:
        raise ValueError(f"tokens must be one prompt, [1, t], got {tokens.shape}")
    say = say or (lambda line: None)
    t = tokens.shape[1]
    lengths = jnp.asarray([t], jnp.int32)
    query_tiles = jnp.asarray(scored_tiles(t, QUERY_TILES))
    layers: list[QKV] = list(capture_qkv(model, tokens))
    heads = model.config.num_heads

    given = {name: resolve_patterns(found, model.config.num_layers, heads) for name, found in patterns.items()}
    sparse = {name: found for name, found in given.items() if found is not None and name != "dense"}
    if len(sparse) < len(given):
        raise ValueError("patterns: dense attention is compared with anyway")
    first = next(iter(sparse))
    wanted = mean_density(layers, sparse[first], lengths)
    say(f"{first}: density {wanted:.4f}")
    every = {name: found.arrays() for name, found in sparse.items()}
    for candidate in check_candidates(default_candidates() if candidates is None else candidates):
        pattern = _at_density(layers, candidate, wanted, lengths)
        # Arrays whose static side is the kind's, so that one program serves all candidates of a kind.
        one = arrays([pattern] * heads, t)
        every[repr(pattern)] = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(layers), *x.shape)), one)
        say(f"brought to the same: {pattern!r}")

    density, error, recall = (np.zeros((len(every), len(layers), heads)) for _ in range(3))
    unspent = [found.begin(tokens.shape[0]) for found in every.values()]
    for index, (q, k, v) in enumerate(layers):
        each = [
            dataclasses.replace(found.layer(index), unspent=left)
            for found, left in zip(every.values(), unspent, strict=True)
        ]
        masks = [plan_masks(q, k, heads, lengths, query_tiles) for heads in each]
        unspent = [heads.left(m.density, None) for heads, m in zip(each, masks, strict=True)]
        errors = output_errors(q, k, v, jnp.stack([m.keys for m in masks]), query_tiles, lengths)
        density[:, index] = np.stack([np.asarray(m.density[0]) for m in masks])
        error[:, index], recall[:, index] = np.asarray(errors.error[:, 0]), np.asarray(errors.recall[:, 0])
    del layers

    rows = [Row("dense", 1.0, 0.0, 1.0, 0.0, math.nan)]
    for name, d, e, r in zip(every, density, error, recall, strict=True):
        rows.append(Row(name, float(d.mean()), float(e.mean()), float(r.mean()), float(e.max()), math.nan))
    for row in rows[1:]:
        say(format_row(row))
    if perplexity:
        for i, row in enumerate(rows):
            found = _log_likelihoods(model.config, model.params(), every.get(row.name), tokens, lengths)
            scores = np.asarray(found, np.float64)
            rows[i] = row._replace(perplexity=float(np.exp(-scores.sum() / (t - 1))))
            say(format_row(rows[i]))
    return rows


@partial(jax.jit, static_argnames="config")
def _log_likelihoods(
    config: LlamaConfig, params: Mapping[str, Array], patterns: LayerPatterns | None, tokens: Array, lengths: Array
) -> Array:
    # Not the model's own method: arrays of the kind's widths let one program serve all candidates of a kind.
    x, _, _ = forward.prefill(config, params, patterns, tokens, lengths, lengths, None, None)
    return forward.log_likelihoods(config, params, x, tokens, lengths)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = "| patterns | density | output error | worst head | recall | perplexity |\n|---|---|---|---|---|---|"
    return "\n".join([head, *map(format_row, rows)])


def format_row(row: Row) -> str:
    """One line of the Markdown table."""
    perplexity = "" if math.isnan(row.perplexity) else f"{row.perplexity:.3f}"
    return (
        f"| {row.name} | {row.density:.4f} | {row.error:.4f} | {row.worst_error:.3f} | {row.recall:.4f} "
        f"| {perplexity} |"
    )


def _at_density(layers: Sequence[QKV], candidate: Pattern, wanted: float, lengths: Array) -> Pattern:
    """The candidate scaled to the least mean density, of those tried, that is at least `wanted`."""
    t, heads = layers[0][1].shape[1], layers[0][0].shape[2]

    def density(pattern: Pattern) -> float:
        return mean_density(layers, HeadPatterns.uniform(pattern, len(layers), heads), lengths)

    factor, low, high = factor_at(wanted, t), 0.0, math.inf  # density(low) < wanted <= density(high)
    best, best_density = candidate, math.inf
    for attempt in range(10 * TRIES):
        pattern = candidate.scaled(factor, t)
        found = density(pattern)
        if found >= wanted:
            high = factor
            if found < best_density:
                best, best_density = pattern, found
        else:
            low = factor
        if best_density <= wanted * CLOSE or (attempt >= TRIES and best_density < math.inf):
            break
        # Density grows about as the budgets do: aim half way into what is close enough. It grows in steps of a tile,
        # so go on by a quarter at least, and halve the bracket every other time.
        aim = factor * wanted * (1 + CLOSE) / 2 / found
        if high == math.inf:
            factor = max(aim, 1.25 * low)
        elif low == 0:
            factor = min(aim, high / 1.25)
        else:
            factor = aim if low * 1.001 < aim < high / 1.001 and attempt % 2 else math.sqrt(low * high)
        if factor > 4 * t:
            break
    if best_density == math.inf:
        raise ValueError(f"{candidate!r} cannot visit {wanted:.3f} of the causal cells")
    return best
