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
from minference_jax.search.candidates import arrays, scaled
from minference_jax.search.cost import CostModel, Latency
from minference_jax.search.plans import PlanMasks, plan_masks, scored_tiles
from minference_jax.search.score import output_errors
from minference_jax.search.settings import Settings

QKV = tuple[Array, Array, Array]

_KEYS = costs.PAPER_TARGET.sink + costs.PAPER_TARGET.window  # visited by a row with a candidate's own budgets, about


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """Measurements of one layer's heads: what `choose` works on, and what an interrupted search keeps.

    `factors`: float64 `[candidates, n]`, of equal cost. Of each option (candidate · ladder + step): `density`
    `[o, n]`, mean over samples; `error` and `recall` `[o, b, n]` as in `HeadErrors`. Six digits are kept.
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
    """Measures layers of one model and one set of samples: what all layers share."""

    def __init__(self, settings: Settings, lengths: Array, tokens: int):
        self.settings, self.lengths, self.tokens = settings, lengths, tokens
        self.query_tiles = jnp.asarray(scored_tiles(int(jnp.max(lengths)), settings.query_tiles))

    def masks(self, qkv: QKV, patterns: list[Pattern]) -> PlanMasks:
        """The plan of one pattern per head, all of one kind."""
        return plan_masks(qkv[0], qkv[1], arrays(patterns, self.tokens), self.lengths, self.query_tiles)

    def density(self, qkv: QKV, candidate: Pattern, factors: np.ndarray) -> np.ndarray:
        """float64 `[n]`, mean over samples, of a candidate with each head's own factor."""
        found = self.masks(qkv, [scaled(candidate, float(f), self.tokens) for f in factors]).density
        return np.asarray(found, np.float64).mean(0)

    def calibrate(self, qkv: QKV) -> tuple[CostModel, float]:
        """How density turns into cost, and the target as a cost (of a layer whose heads are all like it)."""
        settings, heads = self.settings, qkv[0].shape[2]

        def density_of(pattern: Pattern) -> float:
            return float(np.mean(self.density(qkv, pattern, np.ones(heads))))

        if settings.cost == "visited":
            model = CostModel.visited(len(settings.candidates))
            return model, costs.target_density(settings.target, self.tokens, density_of)
        if isinstance(settings.target, Latency):
            near, target = 0.1, settings.target.milliseconds / 1000
        else:
            pattern = costs.default_target(self.tokens) if settings.target is None else settings.target
            assert not isinstance(pattern, int | float)  # settings are checked
            near = costs.target_density(pattern, self.tokens, density_of)
            target = costs.seconds(qkv, self.lengths, pattern)
        factors = [
            float(np.median(adjust(lambda f, c=c: self.density(qkv, c, f), near, self._guess(near), heads)))
            for c in settings.candidates
        ]
        model = costs.measure(
            qkv,
            self.lengths,
            settings.candidates,
            factors,
            lambda c, f: float(np.mean(self.density(qkv, settings.candidates[c], np.full(heads, f)))),
        )
        return model, target

    def measure(self, qkv: QKV, model: CostModel, target: float) -> LayerRecord:
        """Everything the choice needs to know of one layer."""
        settings, heads = self.settings, qkv[0].shape[2]
        guess = self._guess(target if settings.cost == "visited" else 0.1)
        factors, density, visited = [], [], []
        for index, candidate in enumerate(settings.candidates):
            found = adjust(lambda f, i=index, c=candidate: model.of(i, self.density(qkv, c, f)), target, guess, heads)
            factors.append(found)
            for step in settings.ladder:
                masks = self.masks(qkv, [scaled(candidate, float(f), self.tokens) for f in found * step])
                density.append(np.asarray(masks.density, np.float64).mean(0))
                visited.append(masks.keys)
        errors = output_errors(*qkv, jnp.stack(visited), self.query_tiles, self.lengths)
        return LayerRecord(np.stack(factors), _short(np.stack(density)), *(_short(x) for x in errors))

    def _guess(self, density: float) -> float:
        return density * self.tokens / 2 / _KEYS


def _short(x: Any) -> np.ndarray:
    return np.round(np.asarray(x, np.float64), 6)
