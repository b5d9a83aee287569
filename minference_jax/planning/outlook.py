"""Whether sparse attention pays for a model at a prompt's length on some GPU, and what fits there: from the config
alone, with nothing run.

Times are those of `patterns.rates`: layers times one layer's attention, and the rest of the network as 2 operations a
weight and token at the rate of dense attention. On an H200, Llama-3-8B so takes 10.6 s for 128K tokens densely (11.1
measured) and 3.5 s sparsely (3.4; notebooks/speed.md, commit e0a1d36).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from minference_jax.models.config import LlamaConfig
from minference_jax.models.params import layer_shapes, layers_with
from minference_jax.patterns import HeadPatterns
from minference_jax.patterns.rates import MARGIN, RATES, predicted, rates_of
from minference_jax.planning.auto import AUTO, auto_patterns
from minference_jax.planning.memory import GPUS, USABLE, WAYS, longest_prompt, memory_need

MEMORY: dict[str, float] = {
    "H100": GPUS["80 GB"],
    "H200": GPUS["141 GB"],
    "A100": GPUS["80 GB"],
    "A10": GPUS["24 GB"],
    "L40S": GPUS["48 GB"],
    "RTX 4090": GPUS["24 GB"],
    "RTX 5090": 31.8,
    "B200": GPUS["180 GB"],
}
"""GiB of each GPU that rates are known of, in its largest form."""


@dataclasses.dataclass(frozen=True)
class Outlook:
    """Of one prompt length. Seconds are of the prefill of one prompt in 16 bits.

    - `pays`: whether sparse attention is faster by enough to be chosen. `patterns`: those it is asked of.
    - `fits`: the fastest of `memory.WAYS` that fits, and its memory; None where none does.
    """

    tokens: int
    patterns: HeadPatterns
    dense_seconds: float
    sparse_seconds: float
    attention_share: float
    pays: bool
    fits: tuple[str, float] | None

    @property
    def gain(self) -> float:
        """How many times as fast sparse prefill is."""
        return self.dense_seconds / self.sparse_seconds


def outlook(
    config: LlamaConfig, tokens: int, gpu: str, *, patterns: HeadPatterns | None = None, batch: int = 1
) -> Outlook:
    """What to expect of prompts of `tokens` tokens on `gpu`, one of `MEMORY`.

    **Arguments:** `patterns`: None for those of "auto" at this length. `batch`: prompts at once, for the memory.

    `attention_share` is that of dense attention in dense prefill. Raises `ValueError` for an unknown GPU.
    """
    if gpu not in MEMORY:
        raise ValueError(f"gpu must be one of {', '.join(MEMORY)}, got {gpu!r}")
    if tokens < 1 or batch < 1:
        raise ValueError(f"tokens and batch must be at least 1, got {tokens} and {batch}")
    asked = auto_patterns(config.num_layers, config.num_heads, tokens) if patterns is None else patterns
    heads = [pattern for layer in asked.layers for pattern in layer]
    times = predicted(heads, config.num_heads, config.head_dim, tokens, tokens, gpu)
    rest = tokens * other_operations(config) / rates_of(gpu).dense
    windowed = sum(kind.window for kind in config.layer_kinds)
    of_windows = windowed * times.dense_ms * min(1.0, 2 * (config.sliding_window or 0) / tokens)
    chunks = config.traits.dual_chunk  # of which longer prompts are read densely
    sparse_ms = times.dense_ms if chunks is not None and tokens > chunks.chunk_size else times.sparse_ms
    dense, sparse = ((of_windows + (config.num_layers - windowed) * ms) / 1e3 for ms in (times.dense_ms, sparse_ms))
    pays = times.dense_ms > MARGIN * sparse_ms
    return Outlook(
        tokens,
        asked,
        rest + dense,
        rest + sparse,
        dense / (rest + dense),
        pays,
        _fitting(config, tokens, gpu, asked, batch),
    )


def other_operations(config: LlamaConfig) -> float:
    """Operations a token of all layers' products with weights: 2 a weight, of the experts that serve it alone."""
    experts, total = config.traits.experts, 0.0
    for name, shape in layer_shapes(config).items():
        layers = len(layers_with(config, name))
        if name.startswith(("w", "router", "shared_")):
            total += layers * math.prod(shape)
        elif name.startswith("expert_"):
            assert experts is not None
            total += layers * math.prod(shape) * experts.chosen / experts.number
    return 2 * total


def room(config: LlamaConfig, gpu: str, *, patterns: HeadPatterns | None = None, batch: int = 1) -> dict[str, int]:
    """The longest prompt of each of `memory.WAYS` on `gpu`. `patterns`: None for those of "auto" at each length."""
    asked: dict[str, Any] = {"patterns": AUTO if patterns is None else patterns, "batch": batch}
    return {way: longest_prompt(config, _bytes(gpu), **asked, **options) for way, options in WAYS.items()}


def source(gpu: str) -> str:
    """Where the rates of a GPU are from."""
    return RATES[gpu].source


def _bytes(gpu: str) -> float:
    return USABLE * MEMORY[gpu] * 2**30


def _fitting(
    config: LlamaConfig, tokens: int, gpu: str, patterns: HeadPatterns, batch: int
) -> tuple[str, float] | None:
    ways: dict[str, dict[str, Any]] = {name: way for name, way in WAYS.items() if way["cache"]}
    for name, options in ways.items():
        need = memory_need(config, tokens=tokens, batch=batch, patterns=patterns, **options)
        if need.total <= _bytes(gpu):
            return name, need.total / 2**30
    return None
