"""One layer's part of the search: every candidate brought to equal cost in every head, then measured at each step of
the ladder."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minference_jax.patterns import Pattern
from minference_jax.search import cost as costs
from minference_jax.search.adjust import adjust
from minference_jax.search.candidates import arrays, factor_at
from minference_jax.search.cost import CostModel, Latency
from minference_jax.search.plans import PlanMasks, plan_masks, scored_tiles
from minference_jax.search.score import HeadErrors, output_errors
from minference_jax.search.settings import Settings
from pallas_kernels.plan import num_query_tiles

QKV = tuple[Array, Array, Array]


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """Measurements of one layer's heads: what `choose` works on, and what an interrupted search keeps.

    An *option* is one candidate at one step of the ladder of budgets; its number is candidate · steps + step.

    - `factors`: float64 `[candidates, n]`: what each candidate's budgets are multiplied with to cost the target.
    - `density`: `[o, n]` for each option, visited / causal cells of all samples together.
    - `error`, `recall`: `[o, b, n]` for each option and sample, as in `HeadErrors`. With end tiles `[o, 2b, n]`: first
      the samples, then their ends.

    Six digits are kept.
    """

    factors: Float[np.ndarray, "candidates n"]
    density: Float[np.ndarray, "o n"]
    error: Float[np.ndarray, "o b n"]
    recall: Float[np.ndarray, "o b n"]

    def to_json(self) -> dict[str, Any]:
        """Nested lists."""
        return {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> LayerRecord:
        """The inverse of `to_json`, exactly."""
        return cls(**{field.name: np.asarray(content[field.name], np.float64) for field in dataclasses.fields(cls)})


class LayerMeter:
    """Measures layers of one model on one set of samples.

    Samples are measured one by one, all by the same compiled programs. Each is scored at rows spread over its own
    length, so that a short one counts as much in the error as a long one. Densities are pooled: visited over causal
    cells of all samples together, since that is what the kernel spends.
    """

    def __init__(self, settings: Settings, lengths: Array, tokens: int):
        self.settings, self.tokens = settings, tokens
        sizes = np.asarray(lengths, np.float64)
        self.lengths = [lengths[i : i + 1] for i in range(len(sizes))]
        self.cells = sizes * (sizes + 1) / 2
        tiles = [scored_tiles(int(n), settings.query_tiles) for n in sizes]
        totals = [num_query_tiles(int(n)) for n in sizes]
        ends = [np.arange(max(0, n - settings.end_tiles), n, dtype=np.int32) for n in totals]
        # Past its end no row of a sample is scored: all have as many tiles as the longest, for one program.
        self.spread, past = max(map(len, tiles)), num_query_tiles(tokens)

        def padded(tiles: np.ndarray, count: int) -> np.ndarray:
            return np.pad(tiles, (0, count - len(tiles)), constant_values=past)

        self.query_tiles = [
            jnp.asarray(np.concatenate([padded(t, self.spread), padded(e, settings.end_tiles)]))
            for t, e in zip(tiles, ends, strict=True)
        ]

    def samples(self, qkv: QKV) -> list[QKV]:
        """Queries, keys and values of each sample alone, with a batch axis of 1."""
        q, k, v = qkv
        return [(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(len(self.lengths))]

    def masks(self, samples: list[QKV], patterns: list[Pattern]) -> list[PlanMasks]:
        """Of each sample, the plan of one pattern per head, all of one kind."""
        heads = arrays(patterns, self.tokens)
        shared = zip(samples, self.lengths, self.query_tiles, strict=True)
        return [plan_masks(q, k, heads, length, tiles) for (q, k, _), length, tiles in shared]

    def pooled(self, masks: list[PlanMasks]) -> Float[np.ndarray, " n"]:
        """Visited / causal cells of each head, of all samples together."""
        return np.average(np.concatenate([np.asarray(m.density, np.float64) for m in masks]), 0, weights=self.cells)

    def density(self, samples: list[QKV], candidate: Pattern, factors: np.ndarray) -> np.ndarray:
        """float64 `[n]`, pooled over samples, of a candidate with each head's own factor."""
        return self.pooled(self.masks(samples, [candidate.scaled(float(f), self.tokens) for f in factors]))

    def calibrate(self, qkv: QKV) -> tuple[CostModel, float]:
        """How density turns into cost, and the target as a cost (of a layer whose heads are all like it)."""
        settings, heads = self.settings, qkv[0].shape[2]
        if settings.cost == "measured" and len(self.lengths) > 1:  # the time of one prompt: the longest sample
            longest = int(np.argmax(self.cells))
            alone = LayerMeter(settings, self.lengths[longest], self.tokens)
            return alone.calibrate(self.samples(qkv)[longest])
        samples = self.samples(qkv)

        def density_of(pattern: Pattern) -> float:
            return float(np.mean(self.density(samples, pattern, np.ones(heads))))

        if settings.cost == "visited":
            model = CostModel.visited(len(settings.candidates))
            return model, costs.target_density(settings.target, self.tokens, density_of)
        (lengths,) = self.lengths
        if isinstance(settings.target, Latency):
            near, target = 0.1, settings.target.milliseconds / 1000
        else:
            pattern = costs.default_target(self.tokens) if settings.target is None else settings.target
            assert not isinstance(pattern, int | float)  # settings are checked
            near = costs.target_density(pattern, self.tokens, density_of)
            target = costs.seconds(qkv, lengths, pattern)
        guess = factor_at(near, self.tokens)
        factors = [
            float(np.median(adjust(lambda f, c=c: self.density(samples, c, f), near, guess, heads)))
            for c in settings.candidates
        ]
        model = costs.measure(
            qkv,
            lengths,
            settings.candidates,
            factors,
            lambda c, f: float(np.mean(self.density(samples, settings.candidates[c], np.full(heads, f)))),
        )
        return model, target

    def measure(self, qkv: QKV, model: CostModel, target: float) -> LayerRecord:
        """Everything the choice needs to know of one layer."""
        settings, heads, samples = self.settings, qkv[0].shape[2], self.samples(qkv)
        guess = factor_at(target if settings.cost == "visited" else 0.1, self.tokens)
        factors, density, visited = [], [], []
        for i, candidate in enumerate(settings.candidates):
            found = adjust(lambda f, i=i, c=candidate: model.of(i, self.density(samples, c, f)), target, guess, heads)
            factors.append(found)
            for step in settings.ladder:
                masks = self.masks(samples, [candidate.scaled(float(f), self.tokens) for f in found * step])
                density.append(self.pooled(masks))
                visited.append([m.keys for m in masks])
        parts = [slice(self.spread), slice(self.spread, None)] if settings.end_tiles else [slice(None)]
        errors = [
            output_errors(
                *sample,
                jnp.stack([keys[at][:, :, part] for keys in visited]),
                self.query_tiles[at][part],
                self.lengths[at],
            )
            for part in parts
            for at, sample in enumerate(samples)
        ]
        error, recall = (
            np.concatenate([np.asarray(getattr(e, name)) for e in errors], 1) for name in HeadErrors._fields
        )
        return LayerRecord(np.stack(factors), *map(_short, (np.stack(density), error, recall)))


def _short(x: Any) -> np.ndarray:
    return np.round(np.asarray(x, np.float64), 6)
