"""The forward pass over stacked parameters, as pure functions: prefill, one decoding step, logits.

Layers are scanned, so a model of any depth compiles one layer. The residual stream and the KV cache are the scan's
carry and are updated in place; parameters and head patterns are its inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

import pallas_kernels
from minference_jax.models.cache import KVCache
from minference_jax.models.config import LlamaConfig
from minference_jax.models.layers import finish_layer, map_chunks, norm, project_qkv
from minference_jax.models.part_attention import attend_to_cache
from minference_jax.models.rope import LayerRope, layer_rope, turns
from minference_jax.models.stacked import Layer, StackedLayer
from minference_jax.models.window import attend_layer, decode_layer, with_sinks

Params = Mapping[str, Array]

CHUNK = 16_384
"""Rows that projections, norms and the MLP process at once: large enough to fill a GPU, and 0.5 GB for an 8B model."""
PART = 32_768
"""Rows up to which a part of a prompt is processed at once: cutting it in two would copy it in and out again."""
LOGIT_CHUNK = 256
"""Rows whose logits exist at once when only a number per row is kept: 134 MB for a vocabulary of 131,072."""


def stacked_layers(params: Params) -> Layer:
    """The parameters that have a leading layer axis, without their `layers.` prefix."""
    return {name.removeprefix("layers."): value for name, value in params.items() if name.startswith("layers.")}


def embed(config: LlamaConfig, params: Params, tokens: Int32[Array, "b t"]) -> Float[Array, "b t d"]:
    """Token embeddings; ids outside the vocabulary are clipped into it."""
    x = jnp.take(params["embed"], tokens, axis=0, mode="clip")
    return x if config.traits.embed_scale == 1 else x * jnp.asarray(config.traits.embed_scale, x.dtype)


def logits(config: LlamaConfig, params: Params, x: Float[Array, "b t d"]) -> Float[Array, "b t vocab"]:
    """Final norm and head, float32."""
    x = norm(config, x, params["final_norm"])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    head, equation = (params["embed"], "btd,vd->btv") if config.tie_embeddings else (params["lm_head"], "btd,dv->btv")
    y = jnp.einsum(equation, x, head, precision=precision, preferred_element_type=jnp.float32)
    y = y if config.traits.logit_divisor == 1 else y / config.traits.logit_divisor
    cap = config.traits.logit_cap
    return y if cap is None else cap * jnp.tanh(y / cap)


def layer_qkv(
    config: LlamaConfig, layer: Layer, x: Array, rope: LayerRope, start: Array, chunk: int
) -> tuple[Array, Array, Array]:
    """One layer's q, k, v for rows at positions start, start + 1, …, in chunks."""

    def project(first: Array, rows: Array) -> tuple[Array, Array, Array]:
        positions = start + first + jnp.arange(rows.shape[1], dtype=jnp.int32)
        return project_qkv(config, layer, rows, turns(config, rope, positions[None]))

    return map_chunks(project, (x,), chunk)


def attend(
    q: Array,
    k: Array,
    v: Array,
    patterns: Any,
    *,
    lengths: Array,
    q_offset: Any,
    implementation: str | None,
    return_info: bool = False,
    sinks: Array | None = None,
) -> tuple[Array, Any]:
    """Attention of one layer's prefill and, with `return_info`, what is known about it: None when it is dense.

    `sinks`: a score of each head that has no key (`with_sinks`).
    """
    where: dict[str, Any] = {"lengths": lengths, "q_offset": q_offset, "implementation": implementation}
    where["return_lse"] = sinks is not None
    found: Any
    info = None
    if patterns is None:
        found = pallas_kernels.dense_attention(q, k, v, **where)
    else:
        from minference_jax.attention import sparse_attention  # a dense model needs no index

        found = sparse_attention(q, k, v, patterns, **where, return_info=return_info)
        if return_info:
            *found, info = found
            found = found[0] if sinks is None else found
    return (found if sinks is None else with_sinks(found[0], found[1], sinks)), info


def prefill(
    config: LlamaConfig,
    params: Params,
    patterns: Any,
    tokens: Int32[Array, "b t"],
    lengths: Int32[Array, " b"],
    rope_lengths: Int32[Array, " b"],
    cache: KVCache | None,
    start: Int32[Array, ""] | None,
    *,
    keep: str = "nothing",
    chunk: int = CHUNK,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t d"], KVCache | None, Any]:
    """Runs all layers over a prompt or a part of one.

    `start` None: the rows are the whole prompt, and attend to each other. Otherwise they stand at positions start…,
    and attend to the cache, which holds everything before them. `keep` says what to return of each layer, stacked:
    "nothing", "info" (of its attention) or "hidden" (its output). Returns the last layer's output, before the final
    norm, with the cache and what was kept.
    """
    t = tokens.shape[1]
    q_offset = jnp.int32(0) if start is None else start
    seen = jnp.minimum(lengths, q_offset + t)

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, Any]:
        x, cache = carry
        index, layer, layer_patterns = inputs
        q, k, v = layer_qkv(config, layer, x, layer_rope(config, rope_lengths, index), q_offset, chunk)
        if cache is not None:
            cache = cache.write(index, q_offset, k, v)

        sinks = layer.get("sinks")
        served = partial(attend, implementation=implementation, return_info=keep == "info", sinks=sinks)

        def whole() -> tuple[Array, Any]:
            if start is None or cache is None:
                return served(q, k, v, layer_patterns, lengths=seen, q_offset=0)
            return attend_to_cache(served, q, cache, index, layer_patterns, start=start, lengths=lengths)

        out, info = attend_layer(config, index, (q, k, v), cache, whole, start=start, lengths=seen, sinks=sinks)
        x = map_chunks(lambda _, x, out: finish_layer(config, layer, x, out), (x, out), chunk, in_place=True)
        return (x, cache), {"nothing": None, "info": info, "hidden": x}[keep]

    indices = jnp.arange(config.num_layers, dtype=jnp.int32)
    carry = (embed(config, params, tokens), cache)
    (x, cache), kept = jax.lax.scan(step, carry, (indices, stacked_layers(params), patterns))
    if cache is not None:
        written = jax.lax.dynamic_update_slice(cache.tokens, tokens, (jnp.int32(0), q_offset))
        cache = dataclasses.replace(cache, tokens=written, lengths=seen)
    return x, cache, kept


def last_logits(
    config: LlamaConfig, params: Params, x: Float[Array, "b t d"], last: Int32[Array, " b"]
) -> Float[Array, "b vocab"]:
    """Logits of one row per sequence, `last` (clipped to the rows there are)."""
    rows = jnp.take_along_axis(x, jnp.clip(last, 0, x.shape[1] - 1)[:, None, None], axis=1)
    return logits(config, params, rows)[:, 0]


def decode(
    config: LlamaConfig,
    params: Params,
    tokens: Int32[Array, " b"],
    cache: KVCache,
    active: Array | None = None,
) -> tuple[Float[Array, "b vocab"], KVCache]:
    """Appends one token to each sequence: its logits, and the cache one longer.

    Rows where `active` is False keep their length (what they write is past it); their logits mean nothing. A row whose
    cache is full writes nothing.
    """
    rows, positions = jnp.arange(tokens.shape[0], dtype=jnp.int32), cache.lengths
    stacked = stacked_layers(params)

    def step(carry: tuple, index: Array) -> tuple[tuple, None]:
        x, cache = carry
        layer = StackedLayer(stacked, index)
        rope = layer_rope(config, positions + 1, index)
        q, k, v = project_qkv(config, layer, x, turns(config, rope, positions[:, None]))
        cache = cache.append(index, positions, k[:, 0], v[:, 0])
        out = decode_layer(config, index, q[:, 0], cache, positions + 1, layer.get("sinks"))
        return (finish_layer(config, layer, x, out[:, None]), cache), None

    indices = jnp.arange(config.num_layers, dtype=jnp.int32)
    (x, cache), _ = jax.lax.scan(step, (embed(config, params, tokens[:, None]), cache), indices)
    written = cache.tokens.at[rows, positions].set(tokens, mode="drop")
    longer = positions + (1 if active is None else active.astype(jnp.int32))
    cache = dataclasses.replace(cache, tokens=written, lengths=jnp.minimum(longer, cache.capacity))
    return logits(config, params, x)[:, 0], cache


def log_likelihoods(
    config: LlamaConfig,
    params: Params,
    x: Float[Array, "b t d"],
    tokens: Int32[Array, "b t"],
    lengths: Int32[Array, " b"],
) -> Float[Array, "b t"]:
    """log p(token i | tokens before it), float32, from the last layer's output; 0 for the first token and padding.

    Logits exist for `LOGIT_CHUNK` rows at a time.
    """

    def score(_: Array, rows: Array, following: Array) -> Array:
        values = logits(config, params, rows)
        picked = jnp.take_along_axis(values, following[:, :, None], axis=-1, mode="clip")[:, :, 0]
        return picked - jax.nn.logsumexp(values, axis=-1)

    following = jnp.roll(tokens, -1, axis=1)
    scores = jnp.roll(map_chunks(score, (x, following), LOGIT_CHUNK), 1, axis=1)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return jnp.where((positions > 0) & (positions < lengths[:, None]), scores, 0.0)
