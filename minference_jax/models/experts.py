"""A mixture of experts: a router sends each token to a few of many small MLPs.

Each token's row is copied for every expert that serves it, and the copies are sorted by expert. A loop then runs over
blocks of rows that one expert serves: no row is dropped, and no expert is computed for rows that did not choose it. A
block may reach beyond its expert's last row; what it writes there the next block replaces.

Cost: `chosen` MLPs of `width` a token; the copies and their results, 2 · chosen rows a token. `jax.lax.ragged_dot` is
meant for this, but what XLA compiles for it on an H100 (jax 0.11.2) multiplies every row with every expert, from an
array of rows by experts by hidden: 69 GB for 16,384 tokens of Qwen3-30B-A3B.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from minference_jax.models import fp8
from minference_jax.models.config import Experts, LlamaConfig
from minference_jax.models.stacked import Layer, entry

CLAMP, SLOPE = 7.0, 1.702
"""gpt-oss's SwiGLU: where gate and up are clamped, and the slope of its sigmoid."""

SMALLEST, LARGEST = 16, 512
"""Rows of a block: a quarter of what an expert serves on average, within these."""


def gated(config: LlamaConfig, gate: Float[Array, "*rows f"], up: Float[Array, "*rows f"]) -> Float[Array, "*rows f"]:
    """The MLP's activation of `gate`, times `up`."""
    if config.traits.activation == "clamped_swiglu":
        gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
        return gate * jax.nn.sigmoid(gate * SLOPE) * (up + 1)
    return (jax.nn.silu(gate) if config.traits.activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up


def mixture(config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The chosen experts' outputs, each times its weight, summed in float32."""
    experts = config.traits.experts
    assert experts is not None
    rows = x.reshape(-1, x.shape[-1])
    weights, number = (by_sigmoid if experts.scoring == "sigmoid" else by_softmax)(experts, layer, rows)
    flat = number.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.zeros((experts.number,), jnp.int32).at[flat].add(1)
    out = _in_blocks(config, layer, rows[order // experts.chosen], sizes)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    served = out[place].reshape(*number.shape, -1).astype(jnp.float32)
    return jnp.sum(served * weights[..., None], axis=1).astype(x.dtype).reshape(x.shape)


def by_softmax(
    experts: Experts, layer: Layer, rows: Float[Array, "m d"]
) -> tuple[Float[Array, "m c"], Int32[Array, "m c"]]:
    """The weights of the chosen experts, float32, and their numbers."""
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    scores = jnp.dot(rows, layer["router"], precision=precision)
    scores = (scores + layer["b_router"] if experts.bias else scores).astype(jnp.float32)
    best, number = jax.lax.top_k(scores, experts.chosen)
    # A softmax of the chosen ones is a softmax of all, divided by the sum of theirs.
    every = best if experts.normalized else scores
    return jnp.exp(best - jax.nn.logsumexp(every, axis=-1, keepdims=True)), number


def by_sigmoid(
    experts: Experts, layer: Layer, rows: Float[Array, "m d"]
) -> tuple[Float[Array, "m c"], Int32[Array, "m c"]]:
    """The same of a router whose numbers do not compete: scored, chosen with a bias, and weighted in float32."""
    wide, router = rows.astype(jnp.float32), layer["router"].astype(jnp.float32)
    scores = jax.nn.sigmoid(jnp.dot(wide, router, precision=jax.lax.Precision.HIGHEST))
    choice = scores + layer["choice_bias"].astype(jnp.float32)
    if experts.groups > 1:
        grouped = choice.reshape(len(rows), experts.groups, -1)
        of_group = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
        kept = jax.lax.top_k(of_group, experts.top_groups)[1]
        chosen = jnp.any(kept[:, :, None] == jnp.arange(experts.groups, dtype=jnp.int32), axis=1)
        choice = jnp.where(chosen[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
    number = jax.lax.top_k(choice, experts.chosen)[1]
    weights = jnp.take_along_axis(scores, number, axis=-1)
    if experts.normalized:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * experts.scale, number


def _in_blocks(
    config: LlamaConfig, layer: Layer, rows: Float[Array, "m d"], sizes: Int32[Array, " e"]
) -> Float[Array, "m d"]:
    """The experts' outputs for rows sorted by expert, of which each serves `sizes`."""
    m, d = rows.shape
    size = min(LARGEST, max(SMALLEST, 1 << max(m // (4 * sizes.size), 1).bit_length() - 1))
    ends, blocks = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // size))
    padded = jnp.pad(rows, ((0, size), (0, 0)))

    def block(index: Int32[Array, ""], out: Array) -> Array:
        expert = jnp.searchsorted(blocks, index, side="right").astype(jnp.int32)
        first = ends[expert] - sizes[expert]
        start = first + (index - blocks[expert] + -(-sizes[expert] // size)) * size
        part = jax.lax.dynamic_slice(padded, (start, jnp.int32(0)), (size, d))
        return jax.lax.dynamic_update_slice(out, _expert(config, layer, expert, part), (start, jnp.int32(0)))

    return jax.lax.fori_loop(0, blocks[-1], block, jnp.zeros_like(padded))[:m]


def _expert(
    config: LlamaConfig, layer: Layer, expert: Int32[Array, ""], x: Float[Array, "rows d"]
) -> Float[Array, "rows d"]:
    """One expert's MLP."""

    def of(name: str) -> Array:
        return entry(layer, name, expert)

    def product(name: str, x: Array, rows: fp8.Rows | None) -> Array:
        if rows is not None:
            y = fp8.product(rows, of(name), of(f"{name}_scale"))
        else:
            y = jnp.dot(x, of(name), precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)
        return y + of(f"b_{name}") if f"b_{name}" in layer else y

    def quantized(x: Array) -> fp8.Rows | None:
        return fp8.rows_of(x) if "expert_gate_scale" in layer else None

    rows = quantized(x)
    hidden = gated(config, product("expert_gate", x, rows), product("expert_up", x, rows))
    return product("expert_down", hidden, quantized(hidden))
