"""The pieces of a decoder layer: RMSNorm, projections with RoPE, SwiGLU; and running them in chunks of the sequence.

A layer's parameters are a plain mapping name → array, as `params.layer_shapes` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minference_jax.models import fp8
from minference_jax.models.config import LlamaConfig
from minference_jax.models.experts import gated, mixture
from minference_jax.models.rope import Turns, apply_rope
from minference_jax.models.stacked import Layer, StackedLayer
from minference_jax.parallel.mesh import HEADS


def matmul(equation: str, x: Array, weight: Array) -> Array:
    """einsum in x's dtype. float32 stays float32: GPUs would otherwise round its inputs to 10 bits (TF32)."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, weight, precision=precision)


def project(layer: Layer, names: tuple[str, ...], x: Float[Array, "b t *in"]) -> list[Array]:
    """x times each of the named weights `[*in, *out]`, or their FP8 form, for which x is quantized once."""
    if isinstance(layer, StackedLayer) and layer.serves(names, x):
        return layer.matvec(names, x)
    if f"{names[0]}_scale" in layer:
        rows = fp8.quantize(x.reshape(*x.shape[:2], -1))
        return [fp8.product(rows, layer[name], layer[f"{name}_scale"], x.dtype) for name in names]
    inside = "abc"[: x.ndim - 2]
    outs = ("uvw"[: layer[name].ndim - len(inside)] for name in names)
    return [matmul(f"st{inside},{inside}{o}->st{o}", x, layer[n]) for n, o in zip(names, outs, strict=True)]


def rms_norm(
    x: Float[Array, "*rows d"], weight: Float[Array, " d"], eps: float, offset: float | None = None
) -> Float[Array, "*rows d"]:
    """x / √(mean(x²) + eps) in float32, rounded to x's dtype before the weight, as checkpoints expect.

    With an `offset`, times offset + weight in float32, and rounded after that, as Gemma's and gpt-oss's expect.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if offset is not None:
        return (y * (offset + weight.astype(jnp.float32))).astype(x.dtype)
    return weight * y.astype(x.dtype)


def norm(config: LlamaConfig, x: Float[Array, "*rows d"], weight: Float[Array, " d"]) -> Float[Array, "*rows d"]:
    """The model's RMSNorm."""
    return rms_norm(x, weight, config.rms_norm_eps, config.traits.norm_offset)


def wide_norm(config: LlamaConfig, x: Float[Array, "b t n h"], weight: Float[Array, "n h"], heads: int) -> Array:
    """The model's RMSNorm over all heads of a row at once. A device of a mesh may have some of the `heads` only."""
    if x.shape[2] == heads:
        return norm(config, x.reshape(*x.shape[:2], -1), weight.reshape(-1)).reshape(x.shape)
    y = x.astype(jnp.float32)
    squares = jax.lax.psum(jnp.sum(jnp.square(y), axis=(2, 3), keepdims=True), HEADS)
    y = y * jax.lax.rsqrt(squares / (heads * x.shape[3]) + config.rms_norm_eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def project_qkv(
    config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"], turns: Turns
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t k h"], Float[Array, "b t k h"]]:
    """Normalised input → queries and keys after RoPE, and values."""
    traits = config.traits
    x = norm(config, x, layer["attn_norm"]) if traits.pre_norms else x
    q, k, v = project(layer, ("wq", "wk", "wv"), x)
    if traits.qkv_bias:
        q, k, v = q + layer["bq"], k + layer["bk"], v + layer["bv"]
    if traits.qk_norm:
        q, k = norm(config, q, layer["q_norm"]), norm(config, k, layer["k_norm"])
    if traits.wide_qk_norm:
        q = wide_norm(config, q, layer["wide_q_norm"], config.num_heads)
        k = wide_norm(config, k, layer["wide_k_norm"], config.num_kv_heads)
    q = apply_rope(q, turns.cos, turns.sin, turns.queries, traits.neighbours)
    return q, apply_rope(k, turns.cos, turns.sin, neighbours=traits.neighbours), v


def finish_layer(
    config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"], attended: Float[Array, "b t n h"]
) -> Float[Array, "b t d"]:
    """Output projection and MLP (or experts), each added to the residual stream."""
    traits = config.traits
    out = project(layer, ("wo",), attended)[0]
    out = out + layer["bo"] if traits.o_bias else out
    x = x + _added(config, out, layer["post_attn_norm"] if traits.post_norms else None)
    rows = norm(config, x, layer["mlp_norm"]) if traits.pre_norms else x
    out = _mlp_or_experts(config, layer, rows)
    return x + _added(config, out, layer["post_mlp_norm"] if traits.post_norms else None)


def _mlp_or_experts(config: LlamaConfig, layer: Layer, rows: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    experts = config.traits.experts
    if experts is None:
        return mlp(config, layer, rows)
    if not experts.first:
        return experts_and_shared(config, layer, rows)
    assert isinstance(layer, StackedLayer)  # of whose parameters each layer has a part
    first = jnp.int32(experts.first)

    def served() -> Array:
        return experts_and_shared(config, layer.at(-experts.first).of_experts(), rows)

    return jax.lax.cond(layer.index < first, lambda: mlp(config, layer, rows), served)


def experts_and_shared(config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The chosen experts, and the MLP that serves every token where there is one."""
    out = mixture(config, layer, x)
    if config.traits.experts is None or not config.traits.experts.shared:
        return out
    gate, up = project(layer, ("shared_gate", "shared_up"), x)
    return out + project(layer, ("shared_down",), gated(config, gate, up))[0]


def _added(config: LlamaConfig, out: Array, post_norm: Array | None) -> Array:
    """What a block adds to the residual stream, from its output."""
    out = out if post_norm is None else norm(config, out, post_norm)
    return out if config.traits.residual_scale == 1 else out * jnp.asarray(config.traits.residual_scale, out.dtype)


def mlp(config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The gated MLP."""
    gate, up = project(layer, ("w_gate", "w_up"), x)
    if config.traits.mlp_bias:
        gate, up = gate + layer["b_gate"], up + layer["b_up"]
    out = project(layer, ("w_down",), gated(config, gate, up))[0]
    return out + layer["b_down"] if config.traits.mlp_bias else out


def map_chunks(fn: Callable[..., Any], arrays: tuple[Array, ...], chunk: int, *, in_place: bool = False) -> Any:
    """`fn(first_row, *arrays)` applied to chunks of `chunk` rows along axis 1, its results put together again.

    Bounds the memory of what `fn` makes on the way: an MLP over a million tokens would hold 29 GB at once.
    `fn` must treat rows independently; its results have the rows on axis 1. With `in_place`, it returns one array
    like `arrays[0]`, which the results replace chunk by chunk. A last, shorter chunk is compiled separately.
    """
    t = arrays[0].shape[1]
    if t <= chunk:
        return fn(jnp.int32(0), *arrays)

    def run(out: Any, start: Any, size: int) -> Any:
        sources = (out, *arrays[1:]) if in_place else arrays
        pieces = fn(jnp.int32(start), *(jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in sources))
        return jax.tree.map(lambda o, p: jax.lax.dynamic_update_slice_in_dim(o, p, start, axis=1), out, pieces)

    out: Any = arrays[0]
    if not in_place:
        shapes = jax.eval_shape(fn, jnp.int32(0), *(a[:, :chunk] for a in arrays))
        out = jax.tree.map(lambda s: jnp.zeros((s.shape[0], t, *s.shape[2:]), s.dtype), shapes)
    out = jax.lax.fori_loop(0, t // chunk, lambda i, o: run(o, i * chunk, chunk), out)
    return run(out, t - t % chunk, t % chunk) if t % chunk else out
