"""The pieces of a decoder layer: norms, projections with RoPE, SwiGLU; and running them in chunks of the sequence.

A layer's parameters are a plain mapping name → array, as `params.layer_shapes` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minference_jax.models import fp8
from minference_jax.models.config import LlamaConfig
from minference_jax.models.experts import gated, mixture
from minference_jax.models.norms import norm, rms_norm
from minference_jax.models.residual import Residual
from minference_jax.models.rope import Turns, apply_rope
from minference_jax.models.stacked import ACTIVATIONS, Layer, StackedLayer
from minference_jax.parallel.mesh import HEADS
from pallas_kernels.rows.quantize import Activation, gated_rows, normed_rows
from pallas_kernels.tracing import vary_alike

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
    x: Float[Array, "b t *in"] | fp8.Slice | fp8.Rows,
    *,
    activation: Activation | None = None,
    dtype: Any = None,
) -> list[Array]:
    """x times each of the named weights `[*in, *out]`, or their FP8 form, for which x is quantized once.

    `activation`: of two weights, that of the first product times the second, instead. `dtype`: of the results, where
    their sums need not be rounded to x's.
    """
    if isinstance(layer, StackedLayer) and not isinstance(x, fp8.Rows) and layer.serves(names, _plain(x)):
        return layer.matvec(names, _plain(x), activation=activation, dtype=dtype)
    if isinstance(x, fp8.Rows) or quantizes(layer, names, x):
        if not isinstance(x, fp8.Rows):
            x = fp8.rows_of(x.flat() if isinstance(x, fp8.Slice) else x.reshape(*x.shape[:2], -1))
        outs = [fp8.product(x, layer[name], layer[f"{name}_scale"]) for name in names]
    else:
        x = _plain(x)
        inside = "abc"[: x.ndim - 2]
        letters = ("uvw"[: layer[name].ndim - len(inside)] for name in names)
        outs = [matmul(f"st{inside},{inside}{o}->st{o}", x, layer[n]) for n, o in zip(names, letters, strict=True)]
    outs = outs if activation is None else [ACTIVATIONS[activation](outs[0]) * outs[1]]
    return outs if dtype is None else [out.astype(dtype) for out in outs]


def _plain(x: Array | fp8.Slice) -> Array:
    return x.rows if isinstance(x, fp8.Slice) else x


def quantizes(layer: Layer, names: tuple[str, ...], x: Float[Array, "b t *in"] | fp8.Slice) -> bool:
    """Whether `project` quantizes x for these weights."""
    served = isinstance(layer, StackedLayer) and layer.serves(names, _plain(x))
    return not served and f"{names[0]}_scale" in layer


def into_block(
    config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"] | fp8.Slice, weight: str, names: tuple[str, ...]
) -> Float[Array, "b t d"] | fp8.Rows:
    """The residual stream as a block's first weights take it: normalised where the model does so before the block, and
    then quantized for weights in FP8.
    """
    if not config.traits.pre_norms:
        return _plain(x)
    if not quantizes(layer, names, x):
        return norm(config, _plain(x), layer[weight])
    options: dict[str, Any] = {"eps": config.rms_norm_eps, "offset": config.traits.norm_offset}
    return fp8.either(partial(normed_rows, **options), partial(rms_norm, **options), x, layer[weight])


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
    config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"] | fp8.Slice, turns: Turns
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t k h"], Float[Array, "b t k h"]]:
    """Normalised input → queries and keys after RoPE, and values."""
    q, k, v = project(layer, QKV, into_block(config, layer, x, "attn_norm", QKV))
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
    config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"], attended: Float[Array, "b t n h"] | fp8.Slice
) -> Float[Array, "b t d"]:
    """Output projection and MLP (or experts), each added to the residual stream."""
    return Residual(*leave_layer(config, layer, x, attended)).whole()


def leave_layer(
    config: LlamaConfig,
    layer: Layer,
    x: Float[Array, "b t d"],
    attended: Float[Array, "b t n h"] | fp8.Slice,
    dtype: Any = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
    """Both sides of `finish_layer`'s last sum. `dtype`: of the second, where products need not be rounded to x's."""
    traits = config.traits
    out = project(layer, ("wo",), attended, dtype=dtype)[0]
    out = out + layer["bo"].astype(out.dtype) if traits.o_bias else out
    stream = Residual(x, _added(config, out, layer["post_attn_norm"] if traits.post_norms else None))
    x, out = _mlp_or_experts(config, layer, stream, dtype)
    return x, _added(config, out, layer["post_mlp_norm"] if traits.post_norms else None)


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

    def plain(gate: Array, up: Array, row_scale: Array, gate_scale: Array, up_scale: Array) -> Array:
        gate, up = (fp8.rescaled(y, row_scale, scale, rows.dtype) for y, scale in ((gate, gate_scale), (up, up_scale)))
        return gated(config, gate, up)

    products = (fp8.unscaled(rows, layer[name]) for name in names)
    arrays = (*products, rows.scale.reshape(-1), *(layer[f"{name}_scale"] for name in names))
    activation = KERNEL_ACTIVATIONS.get(config.traits.activation)
    if activation is None:
        numbers, scale = fp8.quantize(plain(*arrays))
    else:
        numbers, scale, _ = fp8.either(partial(gated_rows, activation=activation), plain, *arrays)
    shape = rows.scale.shape
    return fp8.Rows(numbers.reshape(*shape, -1), scale.reshape(shape), rows.dtype)


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
        out = jax.tree.map(lambda s: jax.lax.empty((s.shape[0], t, *s.shape[2:]), s.dtype), shapes)
        out = vary_alike(out, arrays)
    out = jax.lax.fori_loop(0, t // chunk, lambda i, o: run(o, i * chunk, chunk), out)
    return run(out, t - t % chunk, t % chunk) if t % chunk else out
