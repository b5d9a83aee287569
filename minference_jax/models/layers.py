"""The pieces of a decoder layer: norms, projections with RoPE, SwiGLU.

A layer's parameters are a plain mapping name → array, as `params.layer_shapes` lists them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minference_jax.models import fp8
from minference_jax.models.chunks import Apart, Slice, Unplaced, flat, plain
from minference_jax.models.config import LlamaConfig
from minference_jax.models.experts import gated, mixture
from minference_jax.models.norms import norm, rms_norm, rounded
from minference_jax.models.placed import only_rotated, rotated_product
from minference_jax.models.residual import Residual
from minference_jax.models.rope import Turns, apply_rope
from minference_jax.models.stacked import ACTIVATIONS, Layer, StackedLayer
from minference_jax.parallel.mesh import HEADS
from pallas_kernels.rows.norms import added_rows, normed_rows
from pallas_kernels.rows.quantize import Activation, gated_rows

QKV = ("wq", "wk", "wv")
"""The weights of queries, keys and values."""

MLP = ("w_gate", "w_up", "w_down")
"""The weights of the MLP that every layer has, or the first ones of a model with experts."""

KERNEL_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_tanh": "gelu"}
"""Activations that a kernel computes on the way into an FP8 product."""


def matmul(equation: str, x: Array, weight: Array) -> Array:
    """einsum in x's dtype. float32 stays float32: GPUs would otherwise round its inputs to 10 bits (TF32)."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, weight, precision=precision)


def project(
    layer: Layer,
    names: tuple[str, ...],
    x: Float[Array, "b t *in"] | Slice | Apart | fp8.Rows,
    *,
    activation: Activation | None = None,
    dtype: Any = None,
) -> list[Array]:
    """x times each of the named weights `[*in, *out]`, or their FP8 form, for which x is quantized once.

    `activation`: of two weights, that of the first product times the second, instead. `dtype`: of the results, where
    their sums need not be rounded to x's.
    """
    if isinstance(layer, StackedLayer) and not isinstance(x, fp8.Rows) and layer.serves(names, plain(x)):
        return layer.matvec(names, plain(x), activation=activation, dtype=dtype)
    if isinstance(x, fp8.Rows) or quantizes(layer, names, x):
        if not isinstance(x, fp8.Rows):
            x = fp8.rows_of(flat(x))
        outs = [fp8.product(x, layer[name], layer[f"{name}_scale"]) for name in names]
    else:
        x = plain(x)
        inside = "abc"[: x.ndim - 2]
        letters = ("uvw"[: layer[name].ndim - len(inside)] for name in names)
        outs = [matmul(f"st{inside},{inside}{o}->st{o}", x, layer[n]) for n, o in zip(names, letters, strict=True)]
    outs = outs if activation is None else [ACTIVATIONS[activation](outs[0]) * outs[1]]
    return outs if dtype is None else [out.astype(dtype) for out in outs]


def quantizes(layer: Layer, names: tuple[str, ...], x: Float[Array, "b t *in"] | Slice | Apart) -> bool:
    """Whether `project` quantizes x for these weights."""
    served = isinstance(layer, StackedLayer) and layer.serves(names, plain(x))
    return not served and f"{names[0]}_scale" in layer


def into_block(
    config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"] | Slice, weight: str, names: tuple[str, ...]
) -> Float[Array, "b t d"] | fp8.Rows:
    """The residual stream as a block's first weights take it: normalised where the model does so before the block, and
    then quantized for weights in FP8.
    """
    if not config.traits.pre_norms:
        return plain(x)
    if not quantizes(layer, names, x):
        return norm(config, plain(x), layer[weight])
    options: dict[str, Any] = {"eps": config.rms_norm_eps, "offset": config.traits.norm_offset}
    return fp8.quantized(partial(normed_rows, **options), partial(rms_norm, **options), x, layer[weight])


def enter_block(
    config: LlamaConfig,
    layer: Layer,
    stream: Residual,
    weight: str,
    names: tuple[str, ...],
    activation: Activation | None = None,
) -> tuple[Float[Array, "b t d"], list[Array]]:
    """The whole residual stream, and what `project` makes of it with a block's first weights, normalised where the
    model does so before the block.
    """
    if config.traits.pre_norms and stream.x.shape[1] == 1 and isinstance(layer, StackedLayer):
        x, rows = stream.normed(config, layer.stacked[weight], layer.index)
        return x, project(layer, names, rows, activation=activation)
    x = stream.whole()
    return x, project(layer, names, into_block(config, layer, x, weight, names), activation=activation)


def wide_norm(config: LlamaConfig, x: Float[Array, "b t n h"], weight: Float[Array, "n h"], heads: int) -> Array:
    """The model's RMSNorm over all heads of a row at once. A device of a mesh may have some of the `heads` only."""
    if x.shape[2] == heads:
        return norm(config, x.reshape(*x.shape[:2], -1), weight.reshape(-1)).reshape(x.shape)
    y = x.astype(jnp.float32)
    squares = jax.lax.psum(jnp.sum(jnp.square(y), axis=(2, 3), keepdims=True), HEADS)
    y = y * jax.lax.rsqrt(squares / (heads * x.shape[3]) + config.rms_norm_eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def project_qkv(
    config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"] | Slice, turns: Turns
) -> tuple[Array | Unplaced, Array | Unplaced, Array | Unplaced]:
    """Normalised input → queries and keys after RoPE `[b, t, n or k, h]`, and values."""
    rows = into_block(config, layer, x, "attn_norm", QKV)
    if isinstance(rows, fp8.Rows) and only_rotated(config, turns):
        made = zip(QKV, (turns, turns, None), strict=True)
        q, k, v = (rotated_product(rows, layer[name], layer[f"{name}_scale"], own) for name, own in made)
        return q, k, v
    q, k, v = project(layer, QKV, rows)
    q, k, v = _completed(config, layer, q, k, v)
    return *rotated(config, turns, q, k), v


def enter_attention(
    config: LlamaConfig, layer: Layer, stream: Residual
) -> tuple[Float[Array, "b t d"], tuple[Float[Array, "b t n h"], Float[Array, "b t k h"], Float[Array, "b t k h"]]]:
    """The whole residual stream, and its queries, keys and values before RoPE."""
    x, (q, k, v) = enter_block(config, layer, stream, "attn_norm", QKV)
    return x, _completed(config, layer, q, k, v)


def _completed(
    config: LlamaConfig,
    layer: Layer,
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t k h"], Float[Array, "b t k h"]]:
    """Products with their biases and norms."""
    traits = config.traits
    if traits.qkv_bias:
        q, k, v = q + layer["bq"], k + layer["bk"], v + layer["bv"]
    if traits.qk_norm:
        q, k = norm(config, q, layer["q_norm"]), norm(config, k, layer["k_norm"])
    if traits.wide_qk_norm:
        q = wide_norm(config, q, layer["wide_q_norm"], config.num_heads)
        k = wide_norm(config, k, layer["wide_k_norm"], config.num_kv_heads)
    return q, k, v


def rotated(
    config: LlamaConfig, turns: Turns, q: Float[Array, "b t n h"], k: Float[Array, "b t k h"]
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t k h"]]:
    """Queries and keys after RoPE."""
    neighbours = config.traits.neighbours
    q = apply_rope(q, turns.cos, turns.sin, turns.queries, neighbours)
    return q, apply_rope(k, turns.cos, turns.sin, neighbours=neighbours)


def finish_layer(
    config: LlamaConfig,
    layer: Layer,
    x: Float[Array, "b t d"] | Slice,
    attended: Float[Array, "b t n h"] | Slice | Apart,
) -> Float[Array, "b t d"]:
    """Output projection and MLP (or experts), each added to the residual stream."""
    return Residual(*leave_layer(config, layer, x, attended)).whole()


def leave_layer(
    config: LlamaConfig,
    layer: Layer,
    x: Float[Array, "b t d"] | Slice,
    attended: Float[Array, "b t n h"] | Slice | Apart,
    dtype: Any = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
    """Both sides of `finish_layer`'s last sum. `dtype`: of the second, where products need not be rounded to x's."""
    traits = config.traits
    if _normed_as_added(config, layer, x, attended):
        x, rows = _added_rows(config, layer, x, fp8.rows_of(flat(attended)))
        return x, mlp(config, layer, rows)
    x, out = plain(x), project(layer, ("wo",), attended, dtype=dtype)[0]
    out = out + layer["bo"].astype(out.dtype) if traits.o_bias else out
    stream = Residual(x, _added(config, out, layer["post_attn_norm"] if traits.post_norms else None))
    x, out = _mlp_or_experts(config, layer, stream, dtype)
    return x, _added(config, out, layer["post_mlp_norm"] if traits.post_norms else None)


def _normed_as_added(config: LlamaConfig, layer: Layer, x: Array | Slice, attended: Array | Slice | Apart) -> bool:
    """Whether nothing but scales and a norm stands between two products in FP8, attention's output and the MLP."""
    traits = config.traits
    between = traits.o_bias or traits.post_norms or traits.residual_scale != 1 or traits.experts is not None
    if between or not traits.pre_norms:
        return False
    return quantizes(layer, ("wo",), attended) and quantizes(layer, MLP[:2], x)


def _added_rows(
    config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"] | Slice, attended: fp8.Rows
) -> tuple[Float[Array, "b t d"], fp8.Rows]:
    """The residual stream with attention's output projection added, and what the MLP takes of it: on GPUs one pass."""
    options: dict[str, Any] = {"eps": config.rms_norm_eps, "offset": config.traits.norm_offset}

    def chain(x: Array, y: Array, row_scale: Array, channel_scale: Array, weight: Array) -> tuple[Array, ...]:
        x = rounded(x + rounded(fp8.rescaled(y, row_scale, channel_scale, x.dtype)))
        return *fp8.quantize(rms_norm(x, weight, **options)), x

    scales = attended.scale.reshape(-1), layer["wo_scale"]
    arrays = fp8.unscaled(attended, layer["wo"]), *scales, layer["mlp_norm"]
    numbers, scale, total = fp8.either(partial(added_rows, **options), chain, x, *arrays)
    return total, fp8.Rows(numbers, scale, total.dtype)


def _mlp_or_experts(
    config: LlamaConfig, layer: Layer, stream: Residual, dtype: Any
) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
    """The whole residual stream, and either of it, which it normalises where the model does so before."""
    experts = config.traits.experts
    activation = KERNEL_ACTIVATIONS.get(config.traits.activation)
    if experts is None:
        quantized = quantizes(layer, MLP[:2], stream.x)
        if activation is not None and not config.traits.mlp_bias and not quantized:
            x, (inner,) = enter_block(config, layer, stream, "mlp_norm", MLP[:2], activation)
            return x, project(layer, MLP[2:], inner, dtype=dtype)[0]
        x = stream.whole()
        return x, mlp(config, layer, into_block(config, layer, x, "mlp_norm", MLP[:2]))
    x = stream.whole()
    rows = norm(config, x, layer["mlp_norm"]) if config.traits.pre_norms else x
    if not experts.first:
        return x, experts_and_shared(config, layer, rows)
    assert isinstance(layer, StackedLayer)  # of whose parameters each layer has a part
    first = jnp.int32(experts.first)

    def served() -> Array:
        return experts_and_shared(config, layer.at(-experts.first).of_experts(), rows)

    return x, jax.lax.cond(layer.index < first, lambda: mlp(config, layer, rows), served)


def experts_and_shared(config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The chosen experts, and the MLP that serves every token where there is one."""
    out = mixture(config, layer, x)
    if config.traits.experts is None or not config.traits.experts.shared:
        return out
    return out + mlp(config, layer, x, ("shared_gate", "shared_up", "shared_down"))


def _added(config: LlamaConfig, out: Array, post_norm: Array | None) -> Array:
    """What a block adds to the residual stream, from its output."""
    out = out if post_norm is None else norm(config, out.astype(post_norm.dtype), post_norm)
    return out if config.traits.residual_scale == 1 else out * jnp.asarray(config.traits.residual_scale, out.dtype)


def mlp(
    config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"] | fp8.Rows, names: tuple[str, str, str] = MLP
) -> Float[Array, "b t d"]:
    """The gated MLP of weights with these names. Only that of `MLP` may have biases."""
    into, out_of, biased = names[:2], names[2:], config.traits.mlp_bias and names == MLP
    if not biased and (isinstance(x, fp8.Rows) or quantizes(layer, into, x)):
        return project(layer, out_of, _gated_rows(config, layer, into, x))[0]
    gate, up = project(layer, into, x)
    if biased:
        gate, up = gate + layer["b_gate"], up + layer["b_up"]
    out = project(layer, out_of, gated(config, gate, up))[0]
    return out + layer["b_down"] if biased else out


def _gated_rows(
    config: LlamaConfig, layer: Layer, names: tuple[str, str], x: Float[Array, "b t d"] | fp8.Rows
) -> fp8.Rows:
    """The activation of an MLP with FP8 weights, quantized for the next: their scales, too, are applied on the way."""
    rows = x if isinstance(x, fp8.Rows) else fp8.rows_of(x)

    def chain(gate: Array, up: Array, row_scale: Array, gate_scale: Array, up_scale: Array) -> tuple[Array, ...]:
        gate, up = (fp8.rescaled(y, row_scale, scale, rows.dtype) for y, scale in ((gate, gate_scale), (up, up_scale)))
        return fp8.quantize(gated(config, gate, up))

    products = (fp8.unscaled(rows, layer[name]) for name in names)
    arrays = (*products, rows.scale.reshape(-1), *(layer[f"{name}_scale"] for name in names))
    activation = KERNEL_ACTIVATIONS.get(config.traits.activation)
    if activation is None:
        numbers, scale = chain(*arrays)
    else:
        numbers, scale = fp8.either(partial(gated_rows, activation=activation), chain, *arrays)
    shape = rows.scale.shape
    return fp8.Rows(numbers.reshape(*shape, -1), scale.reshape(shape), rows.dtype)
