"""A mixture of experts: a router sends each token to a few of many small MLPs.

Rows are sorted by expert and multiplied in one `jax.lax.ragged_dot` a projection: no expert is computed for rows that
did not choose it, and no row is dropped. Cost: `chosen` MLPs of `width` a token; copies of `chosen` rows a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minference_jax.models.config import LlamaConfig

CLAMP, SLOPE = 7.0, 1.702
"""gpt-oss's SwiGLU: where gate and up are clamped, and the slope of its sigmoid."""


def gated(config: LlamaConfig, gate: Float[Array, "*rows f"], up: Float[Array, "*rows f"]) -> Float[Array, "*rows f"]:
    """The MLP's activation of `gate`, times `up`."""
    if config.traits.activation == "clamped_swiglu":
        gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
        return gate * jax.nn.sigmoid(gate * SLOPE) * (up + 1)
    return (jax.nn.silu(gate) if config.traits.activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up


def mixture(config: LlamaConfig, layer: Mapping[str, Array], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The chosen experts' outputs, each times its weight, summed in float32."""
    experts = config.traits.experts
    assert experts is not None
    rows = x.reshape(-1, x.shape[-1])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    scores = jnp.dot(rows, layer["router"], precision=precision)
    scores = (scores + layer["b_router"] if experts.bias else scores).astype(jnp.float32)
    best, number = jax.lax.top_k(scores, experts.chosen)
    # A softmax of the chosen ones is a softmax of all, divided by the sum of theirs.
    every = best if experts.normalized else scores
    weights = jnp.exp(best - jax.nn.logsumexp(every, axis=-1, keepdims=True))

    order = jnp.argsort(number.reshape(-1), stable=True)
    owner = number.reshape(-1)[order]
    sizes = jnp.zeros((experts.number,), jnp.int32).at[owner].add(1)

    def product(x: Array, name: str) -> Array:
        y = jax.lax.ragged_dot(x, _weights(layer, name, x.dtype), sizes, precision=precision)
        return y + layer[f"b_{name}"][owner] if experts.bias else y

    taken = rows[order // experts.chosen]
    hidden = gated(config, product(taken, "expert_gate"), product(taken, "expert_up"))
    out = product(hidden, "expert_down").astype(jnp.float32) * weights.reshape(-1)[order][:, None]
    back = jnp.zeros_like(out).at[order].set(out).reshape(rows.shape[0], experts.chosen, -1)
    return jnp.sum(back, axis=1).astype(x.dtype).reshape(x.shape)


def _weights(layer: Mapping[str, Array], name: str, dtype: jnp.dtype) -> Array:
    """Experts' weights `[e, in, out]`; FP8 ones `[e, out, in]` are multiplied out for the one layer."""
    scale = layer.get(f"{name}_scale")
    if scale is None:
        return layer[name]
    return (layer[name].astype(jnp.float32) * scale[:, :, None]).astype(dtype).swapaxes(1, 2)
