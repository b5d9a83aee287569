"""Checks of what callers pass to a model, before anything is traced: each error names the argument and the shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Int32

from minference_jax.models import fp8
from minference_jax.models.cache import KVCache
from minference_jax.models.config import LlamaConfig
from minference_jax.models.params import IN_FLOAT32, param_shapes
from minference_jax.patterns.heads import HeadPatterns
from minference_jax.patterns.resolve import resolve_patterns
from pallas_kernels.checks import clamped

QUERY_TILE = 128
INT32 = -(2**31), 2**31 - 1
"""Numbers of 64 bits are clamped to these before they are narrowed: JAX would cut off their upper halves."""
_FLOATS = ("float32", "bfloat16", "float16")


def check_patterns(config: LlamaConfig, patterns: HeadPatterns | None) -> None:
    """Raises `ValueError` when patterns, or the arrays of a plan builder, are of another number of layers or heads."""
    if patterns is None:
        return
    resolve_patterns(patterns, config.num_layers, config.num_heads)
    for builder in patterns.builders:
        wrong = [jnp.shape(leaf) for leaf in jax.tree.leaves(builder) if jnp.shape(leaf)[:1] != (config.num_layers,)]
        if wrong:
            raise ValueError(f"plan builder has arrays {wrong}; the model has {config.num_layers} layers")


def check_params(config: LlamaConfig, params: Mapping[str, Array]) -> None:
    """Raises `ValueError` that lists every missing, unexpected or wrongly shaped parameter, and mixed dtypes.

    The projections may be in FP8, all of them, as `fp8.quantize_params` makes them.
    """
    expected = param_shapes(config)
    narrow = [name for name, value in params.items() if value.dtype == fp8.DTYPE]
    if narrow:
        expected = fp8.fp8_shapes(expected)
    problems = [f"{name} is missing" for name in expected if name not in params]
    problems += [f"{name} is unexpected" for name in params if name not in expected]
    problems += [
        f"{name} has shape {tuple(params[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in params and tuple(params[name].shape) != shape
    ]
    exact = [f"layers.{name}" for name in IN_FLOAT32]
    others = (name for name in params if name not in narrow and name not in exact and not name.endswith("_scale"))
    dtypes = sorted({jnp.dtype(params[name].dtype).name for name in others})
    if len(dtypes) > 1 or not set(dtypes) <= set(_FLOATS):
        problems.append(f"dtypes must be one of {', '.join(_FLOATS)} for all, got {', '.join(dtypes)}")
    if problems:
        raise ValueError("params do not fit the config: " + "; ".join(problems))


def check_tokens(tokens: Any, lengths: Any) -> tuple[Int32[Array, "b t"], Int32[Array, " b"]]:
    """tokens and lengths as int32 arrays, lengths clipped to [0, t]; `ValueError` or `TypeError` if malformed."""
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must have shape [batch, tokens] without empty axes, got {tokens.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if not all(isinstance(size, int) for size in tokens.shape):
        raise ValueError(f"tokens has symbolic axes, {tokens.shape}: programs are for one batch and one length")
    sharding = jax.typeof(tokens).sharding
    if AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec):
        raise ValueError(
            f"tokens are divided over Explicit axes of a mesh: {sharding.spec}; call the model in jax.shard_map, or "
            "put it on a mesh (Llama.on) and pass whole tokens"
        )
    b, t = tokens.shape
    lengths = jnp.full((b,), t, jnp.int32) if lengths is None else check_lengths(lengths, b)
    return clamped(tokens, *INT32), jnp.clip(lengths, 0, t)


def check_lengths(lengths: Any, batch: int) -> Int32[Array, " b"]:
    """One int32 per sequence; `ValueError` or `TypeError` if it is anything else."""
    lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), one for each row of tokens, got {lengths.shape}")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    return clamped(lengths, *INT32)


def check_start(start: Any, tokens: Array, cache: KVCache | None) -> Int32[Array, ""] | None:
    """`start` as a traced scalar, or None for a whole prompt; `ValueError` when it or the tokens do not fit."""
    b, t = tokens.shape
    if cache is not None and (cache.lengths.shape != (b,) or cache.capacity < t):
        raise ValueError(
            f"tokens {tokens.shape} do not fit a cache of {cache.lengths.shape[0]} x {cache.capacity} positions"
        )
    if start is None or (isinstance(start, int) and start == 0):
        return None
    if cache is None:
        raise ValueError("start needs the cache that holds the positions before it")
    if isinstance(start, int):
        if start < 0 or start % QUERY_TILE:
            raise ValueError(f"start must be a multiple of {QUERY_TILE}, got {start}")
        if start + t > cache.capacity:
            raise ValueError(f"start {start} and {t} tokens exceed the cache's {cache.capacity} positions")
        return jnp.asarray(start, jnp.int32)
    if not jnp.issubdtype(jnp.result_type(start), jnp.integer) or jnp.shape(start):
        raise TypeError(f"start must be an integer scalar, got {start!r}")
    # A slice update would clamp what it writes, and nothing else: positions would not be those of the rows.
    start = jnp.clip(jnp.asarray(start, jnp.int32), 0, cache.capacity - t)
    return start // QUERY_TILE * QUERY_TILE
