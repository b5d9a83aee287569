"""The pieces of a decoder layer: RMSNorm, projections with RoPE, SwiGLU; and running them in chunks of the sequence.

A layer's parameters are a plain mapping name → array, as `params.layer_shapes` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from minference_jax.models import fp8
from minference_jax.models.config import LlamaConfig
from minference_jax.models.rope import apply_rope
from pallas_kernels.decode.matvec import stacked_matvec, unsupported_reason

Layer = Mapping[str, Array]


class StackedLayer(Mapping[str, Array]):
    """One layer of stacked parameters `[layers, …]`, sliced when asked for.

    Decoding multiplies single rows with every weight; `project` then reads the stack itself, without the slice.
    """

    def __init__(self, stacked: Layer, index: Int32[Array, ""]):
        self.stacked, self.index = stacked, index

    def __getitem__(self, name: str) -> Array:
        return jax.lax.dynamic_index_in_dim(self.stacked[name], self.index, keepdims=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stacked)

    def __len__(self) -> int:
        return len(self.stacked)

    def serves(self, names: tuple[str, ...], x: Float[Array, "b t *in"]) -> bool:
        """Whether `matvec` can multiply x with these weights: a row a sequence, 16 or 8 bits, whole tiles."""
        return x.shape[1] == 1 and unsupported_reason(*self._flat(names, x)) is None

    def matvec(self, names: tuple[str, ...], x: Float[Array, "b 1 *in"]) -> list[Float[Array, "b 1 *out"]]:
        """x times the named weights `[*in, *out]` of this layer, or their FP8 form; x is not quantized for that."""
        flat, weights, scales = self._flat(names, x)

        def sliced(x: Array, weights: list[Array], index: Array, scales: list[Array]) -> list[Array]:
            layer = [jax.lax.dynamic_index_in_dim(weight, index, keepdims=False) for weight in weights]
            if not scales:
                return [x @ weight for weight in layer]
            factors = [jax.lax.dynamic_index_in_dim(scale, index, keepdims=False) for scale in scales]
            rows = fp8.quantize(x)
            return [fp8.product(rows, weight, scale, x.dtype) for weight, scale in zip(layer, factors, strict=True)]

        outs = jax.lax.platform_dependent(flat, weights, self.index, scales, cuda=stacked_matvec, default=sliced)
        shapes = (
            self.stacked[f"{n}_scale"].shape[1:] if scales else self.stacked[n].shape[x.ndim - 1 :] for n in names
        )
        return [out.reshape(*x.shape[:2], *shape) for out, shape in zip(outs, shapes, strict=True)]

    def _flat(self, names: tuple[str, ...], x: Array) -> tuple[Array, list[Array], list[Array]]:
        """x, weights and scales with their summed and their free axes as one each."""
        flat, weights = x.reshape(x.shape[0], -1), [self.stacked[name] for name in names]
        if f"{names[0]}_scale" not in self.stacked:
            return flat, [w.reshape(w.shape[0], flat.shape[1], -1) for w in weights], []
        scales = [self.stacked[f"{name}_scale"].reshape(weights[0].shape[0], -1) for name in names]
        return flat, [w.reshape(w.shape[0], -1, flat.shape[1]) for w in weights], scales  # the other way round


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


def rms_norm(x: Float[Array, "*rows d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "*rows d"]:
    """x / √(mean(x²) + eps) in float32, rounded to x's dtype before the weight, as checkpoints expect."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return weight * y.astype(x.dtype)


def project_qkv(
    config: LlamaConfig,
    layer: Layer,
    x: Float[Array, "b t d"],
    cos: Float[Array, "#b t r"],
    sin: Float[Array, "#b t r"],
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t k h"], Float[Array, "b t k h"]]:
    """Normalised input → queries and keys after RoPE, and values."""
    x = rms_norm(x, layer["attn_norm"], config.rms_norm_eps)
    q, k, v = project(layer, ("wq", "wk", "wv"), x)
    if config.qkv_bias:
        q, k, v = q + layer["bq"], k + layer["bk"], v + layer["bv"]
    if config.qk_norm:
        q = rms_norm(q, layer["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, layer["k_norm"], config.rms_norm_eps)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def finish_layer(
    config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"], attended: Float[Array, "b t n h"]
) -> Float[Array, "b t d"]:
    """Output projection and SwiGLU MLP, each added to the residual stream."""
    x = x + project(layer, ("wo",), attended)[0]
    gate, up = project(layer, ("w_gate", "w_up"), rms_norm(x, layer["mlp_norm"], config.rms_norm_eps))
    return x + project(layer, ("w_down",), jax.nn.silu(gate) * up)[0]


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
