"""Dense or sparse? What one layer's attention takes either way, from measured rates; the faster one is chosen.

With n heads of h, t query rows and pairs(…) visible (query, key) cells of a head:

- dense: launch + 4 · n · h · pairs(all) / dense rate.
- sparse: launch + index + 4 · n · h · visited / sparse rate.

What a pattern visits and what its index takes, each says of itself (`Pattern.visited`, `Pattern.index_seconds`).
Sparse attention has to be 5 % faster to be chosen.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax

from minference_jax.models.config import LlamaConfig
from minference_jax.patterns import HeadPatterns
from minference_jax.patterns.base import pairs


@dataclass(frozen=True)
class Rates:
    """Measured on one device, bfloat16, head_dim 128: operations a second, seconds.

    - `dense`, `sparse`: 4 · h operations for each visited cell, a second, of long prompts.
    - `launch`: seconds that either attention takes beside that. `index`: seconds of an index of no keys;
      `index_key`: for each key, of 32 query heads.
    - `probe`: visited cells of head_dim 128 that take as long as one score of a probe every few rows, which is stored
      and read again whatever the head_dim.
    - `mass`: visited cells that take as long as one score of a probe whose tile masses alone are kept. `selection`:
      seconds of choosing tiles by their masses, beside that.
    """

    dense: float
    sparse: float
    launch: float
    index: float
    index_key: float
    probe: float
    mass: float
    selection: float


RATES: dict[str, Rates] = {
    "H100": Rates(
        dense=600e12,
        sparse=500e12,
        launch=0.05e-3,
        index=0.5e-3,
        index_key=1.3e-8,
        probe=8.0,
        mass=0.8,
        selection=0.1e-3,
    ),
    "H200": Rates(
        dense=600e12,
        sparse=500e12,
        launch=0.05e-3,
        index=0.5e-3,
        index_key=1.3e-8,
        probe=8.0,
        mass=0.8,
        selection=0.1e-3,
    ),
}
"""By a part of the device's name. An H200 has an H100's arithmetic, which is what both are bound by."""

MARGIN = 1.05
"""How much slower than sparse attention dense attention may be predicted to be and still be chosen: it is exact."""

OTHER = Rates(dense=1.0e12, sparse=0.5e12, launch=0.0, index=2e-3, index_key=1e-7, probe=0.5, mass=0.5, selection=2e-3)
"""Anywhere else, our sparse attention is plain jnp: it has to visit half the cells or fewer to pay."""


@dataclass(frozen=True)
class AttentionChoice:
    """What prefill does at one length: dense or sparse attention, and the predicted milliseconds a layer of each."""

    dense: bool
    dense_ms: float
    sparse_ms: float
    device: str

    def __str__(self) -> str:
        chosen = "dense" if self.dense else "sparse"
        return f"{chosen} (predicted ms a layer: dense {self.dense_ms:.3g}, sparse {self.sparse_ms:.3g}; {self.device})"


def choose_attention(
    config: LlamaConfig, patterns: HeadPatterns, rows: int, keys: int, *, device: str | None = None
) -> AttentionChoice:
    """The faster of dense and sparse attention for `rows` queries at the end of `keys` keys, on `device`.

    `device`: a device's name, by default that of JAX's first one.
    """
    device = jax.devices()[0].device_kind if device is None else device
    return _choose(_Same(config), _Same(patterns), rows, keys, device)


class _Same:
    """A key that is equal to itself only: comparing patterns takes longer than what is remembered of them."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value


@lru_cache(maxsize=256)
def _choose(config_key: _Same, patterns_key: _Same, rows: int, keys: int, device: str) -> AttentionChoice:
    """Remembered, since every prefill asks. Patterns that are new each time still cost little: heads that share a
    pattern object are looked at once."""
    config, patterns = config_key.value, patterns_key.value
    name = next((name for name in RATES if name in device), "")
    rates = RATES.get(name, OTHER)
    operations = 4 * config.head_dim * config.num_heads
    of_head = dataclasses.replace(rates, probe=rates.probe * 128 / config.head_dim)
    heads = [pattern for layer in patterns.layers for pattern in layer]
    number = Counter(map(id, heads))
    distinct = {id(pattern): pattern for pattern in heads}
    visited = sum(number[key] * p.visited(rows, keys, of_head) for key, p in distinct.items()) / len(heads)
    dense = rates.launch + operations * pairs(rows, keys, keys) / rates.dense
    index = max(pattern.index_seconds(keys, config.num_heads, rates) for pattern in distinct.values())
    sparse = rates.launch + index + operations * visited / rates.sparse
    return AttentionChoice(dense <= MARGIN * sparse, 1e3 * dense, 1e3 * sparse, name or f"no rates for {device}")
