"""How much memory a prefill needs, from the config alone; what fits on which GPU; advice when it did not.

With a bytes a number, r rows in one call (a whole prompt, or a part), s keys they attend to, batch b, width d, n query
and k KV heads of h, MLP width f:

- weights: every parameter; with FP8 projections those in one byte, and four for each output channel's scale.
- cache: 2 · layers · b · s · k · (h · bytes + 2 if quantized), and 4 · b · s for the tokens.
- activations: the larger of what attention and what the MLP of a layer take, and a copy of one layer's weights.
  Attention: residual stream, queries, its output, and keys and values, b · (r·(d + 2·n·h) + 2·s·k·h) · a; and what
  the patterns' index and tables take (`Pattern.index_bytes`), with b·s·k·h for keys in FP8 where it may copy them. MLP:
  residual stream, attention's output, and b · 3·f·a for each of the 16,384 rows of a sequence that it has at once, or
  2·f·a, and f in FP8, for each of a device's rows where these are not cut; and d·a for each where its output is
  normalised. With experts, three copies of a row for each that serves it.

On a mesh of N devices and H groups of heads each holds its slices of the weights and 1 / H of the cache and of what has
heads; rows outside attention are 1 / N of r. For what is on its way between devices half of q, k, v and the output of
these counts, and where devices share heads, which gather what they share, all.

The first two are exact. The last is checked against what XLA allocates when it compiles for an H100: it is up to 30 %
above for one device and MLPs, up to 41 % on meshes of 2 and 8, 1.3 to 3 times as much with experts, 1.8 times for OLMo
3 (32K tokens), and up to 3 % too little for prompts of 8K to 32K on meshes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from minference_jax.models.cache import cache_dtype
from minference_jax.models.config import LlamaConfig
from minference_jax.models.forward import WHOLE, rows_at_once
from minference_jax.models.fp8 import CONTRACTED, fp8_shapes
from minference_jax.models.params import layer_shapes, param_shapes
from minference_jax.models.rounding import QUANTIZED
from minference_jax.models.window import BLOCK
from minference_jax.parallel.mesh import AXES, HEADS, ROWS
from minference_jax.parallel.specs import param_axes
from minference_jax.patterns import HeadPatterns
from minference_jax.patterns.resolve import Patterns, resolve_patterns
from minference_jax.planning.auto import AUTO, auto_pattern

GPUS: dict[str, float] = {
    "24 GB": 24.0,
    "48 GB": 48.0,
    "80 GB": 79.2,
    "141 GB": 139.8,
    "180 GB": 178.0,
}
"""Memory of GPUs in GiB, as their drivers report it: an H100 has 80 GB, an H200 141 GB, a B200 180 GB."""

USABLE = 0.92
"""Share of it that a program may take. JAX takes 0.75 unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise; the command
line sets this share where you have not."""

PARTS = WHOLE
"""Rows of a part in what is suggested."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of a prefill's weights, cache and activations."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of them: they are needed at once."""
        return self.weights + self.cache + self.activations

    def __str__(self) -> str:
        parts = (f"{name} {getattr(self, name) / 2**30:.1f}" for name in ("weights", "cache", "activations"))
        return f"{self.total / 2**30:.1f} GiB ({', '.join(parts)})"


class OutOfDeviceMemoryError(RuntimeError):
    """The device's memory did not suffice; the text says what would fit."""


def memory_need(
    config: LlamaConfig,
    *,
    tokens: int,
    batch: int = 1,
    chunk: int | None = None,
    dtype: str = "bfloat16",
    cache: str | None = "model",
    fp8_projections: bool = False,
    patterns: Patterns = AUTO,
    mesh: Mesh | AbstractMesh | None = None,
) -> MemoryNeed:
    """The bytes that a prefill of `batch` prompts of `tokens` takes on each device.

    **Arguments:**

    - `config`: of the model.
    - `tokens`: capacity of the cache, generated tokens included.
    - `chunk`: rows of a part, where the prompt is read in parts; None for one call.
    - `dtype`: of weights and activations.
    - `cache`: "model" (in `dtype`), "fp8" or "int8"; None keeps no cache, which needs `chunk` None.
    - `fp8_projections`: whether the projections are in FP8.
    - `patterns`: as for `Llama.from_pretrained`. "auto" (the default) stands for what it uses at this length, None for
      dense attention.
    - `mesh`: of the devices that share the work; None for one.

    **Raises:** ValueError for a `chunk` without a cache, and what `resolve_patterns` raises.

    The formula is at the top of `planning/memory.py`.
    """
    if chunk is not None and cache is None:
        raise ValueError("a prefill in parts needs a cache")
    given = auto_pattern(tokens) if isinstance(patterns, str) and patterns == AUTO else patterns
    found = resolve_patterns(given, config.num_layers, config.num_heads)
    size = jnp.dtype(dtype).itemsize
    rows = min(chunk or tokens, tokens)
    mesh = ONE_DEVICE if mesh is None else mesh
    return MemoryNeed(
        weights=_weights(_own_shapes(config, mesh), size, fp8_projections),
        cache=0 if cache is None else _cache(config, batch, tokens, cache, dtype) // mesh.shape[HEADS],
        activations=_activations(config, batch, rows, tokens, size, fp8_projections, found, mesh),
    )


def _own_shapes(config: LlamaConfig, mesh: Mesh | AbstractMesh) -> dict[str, tuple[int, ...]]:
    """Name → shape of what one device holds of each parameter."""
    axes = param_axes(config, mesh)
    return {
        name: tuple(n // math.prod(mesh.shape[a] for a in cut) for n, cut in zip(shape, axes[name], strict=True))
        for name, shape in param_shapes(config).items()
    }


def _weights(shapes: dict[str, tuple[int, ...]], size: int, fp8_projections: bool) -> int:
    if not fp8_projections:
        return size * sum(map(math.prod, shapes.values()))
    total = 0
    for name, shape in fp8_shapes(shapes).items():
        each = 4 if name.endswith("_scale") else 1 if name.removeprefix("layers.") in CONTRACTED else size
        total += each * math.prod(shape)
    return total


def _cache(config: LlamaConfig, batch: int, tokens: int, cache: str, dtype: str) -> int:
    stored = cache_dtype(cache, dtype)
    row = config.head_dim * stored.itemsize + (2 if stored.name in QUANTIZED else 0)
    return 2 * config.num_layers * batch * tokens * config.num_kv_heads * row + 4 * batch * (tokens + 1)


def index_bytes(patterns: HeadPatterns | None, rows: int, keys: int, heads: int, itemsize: int) -> int:
    """Most that the index of one layer takes: every family that occurs is estimated for all heads."""
    if patterns is None:
        return 0
    families: dict[type, int] = {}
    for pattern in patterns.distinct():
        found = pattern.index_bytes(rows, keys, heads, itemsize)
        families[type(pattern)] = max(found, families.get(type(pattern), 0))
    return sum(families.values())


def _activations(
    config: LlamaConfig,
    batch: int,
    rows: int,
    keys: int,
    size: int,
    fp8_projections: bool,
    patterns: HeadPatterns | None,
    mesh: Mesh | AbstractMesh,
) -> int:
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    heads, own = mesh.shape[HEADS], -(-rows // mesh.size)
    stream, queries = own * config.hidden_size * size, rows * n // heads * h * size
    keys_and_values = 2 * keys * k // heads * h * size
    sent = 0 if mesh.size == 1 else own * (n + k) * h * size * (1 if mesh.shape[ROWS] == 1 else 2)
    index = index_bytes(patterns, rows, keys, batch * n // heads, size)
    if patterns is not None and any(pattern.copies_keys for pattern in patterns.distinct()):
        index += batch * keys * k // heads * h
    attention = batch * (stream + 2 * queries + keys_and_values + sent) + max(
        index, batch * _window_bytes(config, rows, keys) // heads
    )
    at_once = min(own, rows_at_once(batch, rows))
    mlp = batch * (stream + own * n * h * size + at_once * _mlp_row(config, size, fp8_projections, cut=at_once < own))
    stacked = {f"layers.{name}": (1, *shape) for name, shape in layer_shapes(config).items()}
    table = config.vocab_size * config.hidden_size * size if mesh.size > 1 else 0
    return max(max(attention, mlp) + _weights(stacked, size, fp8_projections), table)


def _window_bytes(config: LlamaConfig, rows: int, keys: int) -> int:
    """Bytes of the scores of one block of queries in a layer with a window, in float32, and what becomes of them."""
    if config.sliding_window is None or config.sliding_window >= keys:
        return 0
    block = min(rows, max(BLOCK, config.sliding_window))
    return 3 * 4 * config.num_heads * block * min(rows, block + config.sliding_window)


def _mlp_row(config: LlamaConfig, size: int, fp8_projections: bool, *, cut: bool) -> int:
    """Bytes that a row of the MLP, or of the experts that serve it, takes at once."""
    experts = config.traits.experts
    if experts is None:
        normalised = config.hidden_size if config.traits.post_norms else 0
        inner = config.intermediate_size * (3 * size if cut else 2 * size + fp8_projections)
        return inner + normalised * size
    copies = 3 * experts.chosen * config.hidden_size * size  # sorted rows, their results, and those in rows' order
    mlp = 3 * max(config.intermediate_size if experts.first else 0, experts.shared * experts.width) * size
    return copies + 8 * experts.number + mlp


def longest_prompt(config: LlamaConfig, available: float, **options: Any) -> int:
    """The most tokens, a multiple of 128, for which `memory_need(config, tokens=…, **options)` stays within `available`
    bytes.

    0 where not even 128 fit.
    """
    low, high = 0, 1 << 18
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory_need(config, tokens=128 * middle, **options).total <= available
        low, high = (middle, high) if fits else (low, middle - 1)
    return 128 * low


def prompts_at_once(config: LlamaConfig, available: float, most: int, **options: Any) -> int:
    """The most prompts, `most` or a half, a quarter, … of it, for which `memory_need(config, batch=…, **options)` stays
    within `available` bytes; 1 where not even two fit."""
    while most > 1 and memory_need(config, batch=most, **options).total > available:
        most //= 2
    return most


ONE_DEVICE = AbstractMesh((1, 1), AXES)

WAYS: dict[str, dict[str, Any]] = {
    "logits only, no cache": {"cache": None},
    "cache in 16 bits": {"cache": "model"},
    "cache in FP8": {"cache": "fp8"},
    f"cache in FP8, in parts of {PARTS:,}": {"cache": "fp8", "chunk": PARTS},
    "the same, FP8 projections": {"cache": "fp8", "chunk": PARTS, "fp8_projections": True},
}
"""What to choose between, from the fastest to the smallest."""


def advice(config: LlamaConfig, available: float, *, tokens: int, **options: Any) -> str:
    """What was needed, and what would fit into `available` bytes instead."""
    need = memory_need(config, tokens=tokens, **options)
    lines = [f"{tokens:,} tokens need about {need}; {available / 2**30:.1f} GiB are available."]
    kept = {name: value for name, value in options.items() if name in ("batch", "dtype", "patterns", "mesh")}
    ways = [(name, memory_need(config, tokens=tokens, **kept, **way)) for name, way in WAYS.items() if way["cache"]]
    fitting = [f"{name}: {other}" for name, other in ways if other.total <= available]
    if fitting:
        lines.append("These fit: " + "; ".join(fitting) + ".")
    else:
        smallest = list(WAYS.values())[-1]
        longest = longest_prompt(config, available, **kept, **smallest)
        lines.append(f"At most {longest:,} tokens fit, with an FP8 cache, parts of {PARTS:,} and FP8 projections.")
    return " ".join(lines)


@contextlib.contextmanager
def advise(config: LlamaConfig, **options: Any) -> Iterator[None]:
    """Turns a device's out-of-memory error into an `OutOfDeviceMemoryError` with `advice(config, …, **options)`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfDeviceMemoryError("out of device memory: " + advice(config, device_bytes(), **options)) from error


def device_bytes() -> float:
    """Bytes of the default device that this process may use, as far as it says; else those of an 80 GB GPU."""
    stats = jax.devices()[0].memory_stats() or {}
    return float(stats.get("bytes_limit", USABLE * GPUS["80 GB"] * 2**30))
