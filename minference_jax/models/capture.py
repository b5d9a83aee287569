"""Queries, keys and values of a real prompt, one layer at a time: what pattern search and recall measurements need."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from minference_jax.models import forward
from minference_jax.models.checks import check_tokens
from minference_jax.models.chunks import map_chunks
from minference_jax.models.config import LlamaConfig
from minference_jax.models.dual_chunk import chunks_for
from minference_jax.models.layers import finish_layer
from minference_jax.models.llama import Llama
from minference_jax.models.rope import layer_rope
from minference_jax.models.stacked import Layer, StackedLayer
from minference_jax.models.window import attend_layer
from pallas_kernels.tracing import under_own_settings


def capture_qkv(
    model: Llama, tokens: Int32[Array, "b t"], lengths: Int32[Array, " b"] | None = None
) -> Iterator[tuple[Float[Array, "b t n h"], Float[Array, "b t k h"], Float[Array, "b t k h"]]]:
    """Yields `(q, k, v)` of each layer in turn, q and k after RoPE, in the model's dtype.

    Layers run one by one, with dense attention whatever the model's patterns are, as each is asked for: only one
    layer's arrays exist at a time unless the caller keeps them. One program serves all layers. Rows of padding hold
    what the padding tokens gave; attention never lets them reach a valid row. Raises `ValueError` for a model on a
    mesh, and for prompts that dual chunk attention is for.
    """
    tokens, lengths = check_tokens(tokens, lengths)
    check_capture(model.config, tokens.shape[1], model.mesh)
    return _layers(model.config, model.params(), tokens, lengths)


def check_capture(config: LlamaConfig, tokens: int, mesh: Any = None) -> None:
    """Raises the `ValueError` of `capture_qkv` for a config, prompts of so many tokens, and a mesh."""
    if mesh is not None:
        raise ValueError("model is on a mesh; single layers are captured on one device: model.on(None)")
    if (chunks := chunks_for(config, tokens)) is not None:
        raise ValueError(f"beyond {chunks.chunk_size:,} tokens this model has dual chunk attention, which is dense")


def _layers(config: LlamaConfig, params: forward.Params, tokens: Array, lengths: Array) -> Iterator[Any]:
    x = forward.embed(config, params, tokens)
    for index in range(config.num_layers):
        q, k, v = _project(config, params, x, lengths, jnp.int32(index))
        yield q, k, v
        if index + 1 < config.num_layers:
            x = _finish(config, params, x, q, k, v, lengths, jnp.int32(index))
        del q, k, v


def _layer(params: forward.Params, index: Array) -> Layer:
    stacked = forward.stacked_layers(params)
    if len({len(value) for value in stacked.values()}) > 1:  # layers of two kinds
        return StackedLayer(stacked, index)
    return {name: jax.lax.dynamic_index_in_dim(value, index, keepdims=False) for name, value in stacked.items()}


@partial(jax.jit, static_argnames="config")
@under_own_settings
def _project(config: LlamaConfig, params: forward.Params, x: Array, lengths: Array, index: Array) -> Any:
    rope, positions = layer_rope(config, lengths, index), jnp.arange(x.shape[1], dtype=jnp.int32)
    return forward.layer_qkv(config, _layer(params, index), x, rope, positions)


@partial(jax.jit, static_argnames="config", donate_argnames="x")
@under_own_settings
def _finish(
    config: LlamaConfig, params: forward.Params, x: Array, q: Array, k: Array, v: Array, lengths: Array, index: Array
) -> Array:
    layer = _layer(params, index)
    sinks = layer.get("sinks")

    def whole() -> tuple[Array, Any, Array | None]:
        return forward.attend(q, k, v, None, lengths=lengths, q_offset=0, implementation=None, sinks=sinks)

    out, *_ = attend_layer(config, index, (q, k, v), None, whole, start=None, lengths=lengths, sinks=sinks)
    return map_chunks(partial(finish_layer, config, layer), (x, out), forward.rows_at_once(*x.shape[:2]), in_place=True)
