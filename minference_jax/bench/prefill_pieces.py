"""The pieces of a prefill, each timed by itself in one layer: projections and MLP, index, attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

import pallas_kernels
from minference_jax.attention import make_plan
from minference_jax.models import forward
from minference_jax.models.chunks import map_chunks
from minference_jax.models.config import LlamaConfig
from minference_jax.models.layers import finish_layer
from minference_jax.models.llama import Llama
from minference_jax.models.rope import layer_rope
from minference_jax.patterns import Pattern


class Pieces(NamedTuple):
    """Seconds of each piece, over all layers, and the density of the first layer's plan."""

    projections: float
    indexing: float
    attention: float
    density: float


def time_pieces(
    model: Llama,
    tokens: Int32[Array, "1 t"],
    pattern: Pattern | tuple[Pattern, ...] | None,
    seconds: Callable[[Callable[[], Any]], float],
) -> Pieces:
    """Times the pieces of the first layer; `seconds(run)` measures. The last layer's arrays need not fit beside them:
    what is no longer used is let go.
    """
    config, t = model.config, tokens.shape[1]
    params = model.params()
    layer = {name: value[0] for name, value in forward.stacked_layers(params).items()}
    x = forward.embed(config, params, tokens)
    project = _compiled(_project, (config,), layer, x)
    q, k, v = project()
    projecting = seconds(project)
    indexing, density, plan = 0.0, 1.0, None
    if pattern is None:
        attending = seconds(_compiled(_dense, (), q, k, v))
    else:
        index = _compiled(_index, (pattern,), q, k)
        indexing, plan = seconds(index), index()
        density = float(jnp.mean(plan.density(t, t)))
        attending = seconds(_compiled(_sparse, (), q, k, v, plan))
    del k, v, plan
    # Queries stand for the attention's output, which has their shape. Not donated: the pieces run more than once.
    finishing = seconds(_compiled(_finish, (config,), layer, x, q))
    layers = config.num_layers
    return Pieces(layers * (projecting + finishing), layers * indexing, layers * attending, density)


@partial(jax.jit, static_argnums=0)
def _project(config: LlamaConfig, layer: dict[str, Array], x: Array) -> Any:
    rope = layer_rope(config, jnp.full((1,), x.shape[1], jnp.int32), 0)
    return forward.layer_qkv(config, layer, x, rope, jnp.arange(x.shape[1], dtype=jnp.int32))


@partial(jax.jit, static_argnums=0)
def _finish(config: LlamaConfig, layer: dict[str, Array], x: Array, out: Array) -> Array:
    return map_chunks(partial(finish_layer, config, layer), (x, out), forward.rows_at_once(*x.shape[:2]))


def _compiled(function: Any, static: tuple, *arrays: Any) -> Callable[[], Any]:
    """A call without compilation in it: the first run is as good to time as any."""
    program = function.lower(*static, *arrays).compile()
    return lambda: program(*arrays)


@partial(jax.jit, static_argnums=0)
def _index(pattern: Pattern, q: Array, k: Array) -> Any:
    return make_plan(q, k, pattern)


@jax.jit
def _dense(q: Array, k: Array, v: Array) -> Any:
    return pallas_kernels.dense_attention(q, k, v)


@jax.jit
def _sparse(q: Array, k: Array, v: Array, plan: Any) -> Any:
    return pallas_kernels.sparse_attention(q, k, v, plan)
