"""Dense or sparse? What one layer's attention takes either way (`patterns.rates`); the faster one is chosen.

Sparse attention has to be 5 % faster to be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from minference_jax.models.config import LlamaConfig
from minference_jax.patterns import HeadPatterns
from minference_jax.patterns.rates import MARGIN, predicted
from pallas_kernels.device import target


@dataclass(frozen=True)
class AttentionChoice:
    """What prefill does at one length: dense or sparse attention, and the predicted milliseconds a layer of each.

    `device`: its name; `source`: where its rates are from, whether measured or estimated.
    """

    dense: bool
    dense_ms: float
    sparse_ms: float
    device: str
    source: str

    def __str__(self) -> str:
        chosen = "dense" if self.dense else "sparse"
        return (
            f"{chosen} (predicted ms a layer: dense {self.dense_ms:.3g}, sparse {self.sparse_ms:.3g}; "
            f"{self.device}, {self.source})"
        )


def choose_attention(
    config: LlamaConfig, patterns: HeadPatterns, rows: int, keys: int, *, device: str | None = None
) -> AttentionChoice:
    """The faster of dense and sparse attention for `rows` queries at the end of `keys` keys, on `device`.

    `device`: a device's name, by default that of what programs are made for.
    """
    device = target().device_kind if device is None else device
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
    """Remembered, since every prefill asks."""
    config, patterns = config_key.value, patterns_key.value
    heads = [pattern for layer in patterns.layers for pattern in layer]
    times = predicted(heads, config.num_heads, config.head_dim, rows, keys, device)
    chunks = config.traits.dual_chunk
    dense = times.dense_ms <= MARGIN * times.sparse_ms or (chunks is not None and keys > chunks.chunk_size)
    return AttentionChoice(dense, times.dense_ms, times.sparse_ms, device, times.source)
