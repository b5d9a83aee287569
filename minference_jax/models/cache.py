"""The KV cache: one static buffer for all layers, filled up to each sequence's length, in 16 or 8 bits a number."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int32

from minference_jax.models.config import LlamaConfig
from pallas_kernels.decode import decode_attention, dequantize

QUANTIZED: dict[str, float] = {"float8_e4m3fn": 448.0, "int8": 127.0}
"""Cache dtypes of one byte, and the largest number of each."""

SCALE_DTYPE = jnp.bfloat16
"""Of the factors of quantized rows: numbers are divided by the rounded factor, so its rounding costs nothing."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "tokens", "lengths", "k_scale", "v_scale", "k_axis", "k_along"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after RoPE) and values of every layer, and the tokens they belong to. A frozen pytree of static shape.

    - `k`, `v`: `[layers, b, s, k, h]` in the model's dtype, float8_e4m3fn or int8.
    - `tokens`: int32 `[b, s]`, so that a later turn can tell how much of its prompt is cached already.
    - `lengths`: int32 `[b]`, how many positions are filled. What lies at or past a length is never read.
    - `k_scale`, `v_scale`: `[layers, b, s, k]`, the factor of each head's row; None unless quantized.
    - `k_axis`: float32 `[layers, b, k, h]`, a unit vector, and `k_along`: `[layers, b, s, k]`, what rounding took from
      each key along it; None unless float8_e4m3fn. A key is k · k_scale + k_along · k_axis.

    A quantized row is rounded to 3 bits of mantissa (float8_e4m3fn) or to 1/127 of its largest number (int8), with a
    factor for each token and head: no calibration, and what was written never has to change.

    Three bits are few for keys, whose errors the softmax raises to a power. But queries of a head point much the same
    way, so most of what rounding does to a score is its error along that one direction, and two bytes a key mend it.
    (SmolLM2, a text of 8,192 tokens, last rows, mean over ten layers: attention's output is .044 off without, .025 with
    it, .020 with keys in int8. Rounding keys without their mean gains nothing: .055 becomes .057 over all layers.)
    """

    k: Float[Array, "layers b s k h"]
    v: Float[Array, "layers b s k h"]
    tokens: Int32[Array, "b s"]
    lengths: Int32[Array, " b"]
    k_scale: Float[Array, "layers b s k"] | None = None
    v_scale: Float[Array, "layers b s k"] | None = None
    k_axis: Float[Array, "layers b k h"] | None = None
    k_along: Float[Array, "layers b s k"] | None = None

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, length: int, dtype: jax.typing.DTypeLike) -> KVCache:
        """A cache for `batch` sequences of up to `length` tokens: 2 · layers · batch · length · k · h numbers.

        `dtype`: a floating dtype, or float8_e4m3fn or int8 for a quantized cache.
        """
        if batch <= 0 or length <= 0:
            raise ValueError(f"a cache needs batch and length of at least 1, got {batch} and {length}")
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        scale = partial(jnp.zeros, shape[:-1], SCALE_DTYPE) if jnp.dtype(dtype).name in QUANTIZED else lambda: None
        mended = jnp.dtype(dtype) == jnp.float8_e4m3fn
        return cls(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            tokens=jnp.zeros((batch, length), jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
            k_scale=scale(),
            v_scale=scale(),
            k_axis=jnp.zeros((*shape[:2], *shape[3:]), jnp.float32) if mended else None,
            k_along=scale() if mended else None,
        )

    @property
    def capacity(self) -> int:
        """Static number of positions per sequence."""
        return self.k.shape[2]

    def grown(self, length: int) -> KVCache:
        """This cache with room for at least `length` positions; itself if it has that already.

        A cache that has to grow is given up: its buffers go one by one, so keys and values never exist twice at a time.
        """
        extra = length - self.capacity
        if extra <= 0:
            return self
        longer = {}
        for name, x in {"tokens": self.tokens, **self._rows()}.items():
            axis = 1 if name == "tokens" else 2
            longer[name] = jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])
            _delete(x)
        return dataclasses.replace(self, **longer)

    def release(self) -> None:
        """Gives up the buffers of keys and values, for another cache in their place."""
        for x in self._rows().values():
            _delete(x)

    def on_host(self) -> KVCache:
        """This cache in the host's memory, its device buffers free: for a conversation that waits for its next turn."""
        return self._in("pinned_host")

    def on_device(self) -> KVCache:
        """This cache in the device's memory; itself if it is there."""
        return self._in(self.tokens.sharding.device_set.copy().pop().default_memory().kind)

    def _in(self, kind: str) -> KVCache:
        if self.k.sharding.memory_kind == kind:
            return self
        moved = {name: jax.device_put(x, x.sharding.with_memory_kind(kind)) for name, x in self._rows().items()}
        jax.block_until_ready(moved)
        self.release()
        return dataclasses.replace(self, **moved)

    def write(
        self,
        layer: Array,
        start: Array,
        k: Float[Array, "b t k h"],
        v: Float[Array, "b t k h"],
        q: Float[Array, "b t n h"],
        lengths: Int32[Array, " b"],
    ) -> KVCache:
        """With the rows of one layer at positions start, start + 1, … replaced; tokens and lengths stay.

        `q`, `lengths` (of the whole sequences): the rows' queries, of which those at the start of a prompt decide on
        the `k_axis` of all that follows.
        """
        cache, axis = self, None
        if self.k_axis is not None:
            axis = jax.lax.dynamic_index_in_dim(self.k_axis, layer, keepdims=False)
            axis = jnp.where(start == 0, main_axis(q, jnp.clip(lengths - start, 0, q.shape[1]), k.shape[2]), axis)
            cache = dataclasses.replace(self, k_axis=jax.lax.dynamic_update_index_in_dim(self.k_axis, axis, layer, 0))
        new = cache._encoded(k, v, None if axis is None else axis[:, None])
        return dataclasses.replace(
            cache,
            **{
                name: jax.lax.dynamic_update_slice(x, new[name][None], (layer, 0, start, *(0,) * (x.ndim - 3)))
                for name, x in cache._rows().items()
            },
        )

    def append(
        self, layer: Array, positions: Int32[Array, " b"], k: Float[Array, "b k h"], v: Float[Array, "b k h"]
    ) -> KVCache:
        """With one row of each sequence replaced; a position past the end writes nothing."""
        new, rows = self._encoded(k, v, self._axis(layer)), jnp.arange(positions.shape[0], dtype=jnp.int32)
        return dataclasses.replace(
            self,
            **{name: x.at[layer, rows, positions].set(new[name], mode="drop") for name, x in self._rows().items()},
        )

    def read(
        self, layer: Array | int, dtype: Any, extent: int | None = None
    ) -> tuple[Float[Array, "b s k h"], Float[Array, "b s k h"]]:
        """Keys and values of one layer in `dtype`, of the first `extent` positions (static; None: of all)."""
        extent = self.capacity if extent is None else extent

        def first(x: Array) -> Array:
            size = (1, x.shape[1], extent, *x.shape[3:])
            return jax.lax.dynamic_slice(x, (layer, *(0,) * (x.ndim - 1)), size)[0]

        rows = {name: first(x) for name, x in self._rows().items()}
        if self.k_scale is None:
            return rows["k"], rows["v"]
        axis = self._axis(layer)
        mend = () if axis is None else (rows["k_along"], axis[:, None])
        return dequantize(rows["k"], rows["k_scale"], dtype, *mend), dequantize(rows["v"], rows["v_scale"], dtype)

    def attend(self, layer: Array, q: Float[Array, "b n h"], lengths: Int32[Array, " b"]) -> Float[Array, "b n h"]:
        """Dense attention of one query per sequence to the first `lengths` positions of a layer."""
        names = ("k_scale", "v_scale", "k_axis", "k_along")
        return decode_attention(q, self.k, self.v, layer, lengths, **{name: getattr(self, name) for name in names})

    def _rows(self) -> dict[str, Array]:
        """What is stored of each layer and position."""
        names = ("k", "v", "k_scale", "v_scale", "k_along")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _axis(self, layer: Array | int) -> Float[Array, "b k h"] | None:
        return None if self.k_axis is None else jax.lax.dynamic_index_in_dim(self.k_axis, layer, keepdims=False)

    def _encoded(self, k: Array, v: Array, axis: Array | None) -> dict[str, Array]:
        if self.k_scale is None:
            return {"k": k, "v": v}
        (rounded, k_scale), (v, v_scale) = quantize_rows(k, self.k.dtype), quantize_rows(v, self.v.dtype)
        new = {"k": rounded, "v": v, "k_scale": k_scale, "v_scale": v_scale}
        if axis is None:
            return new
        # Not by way of `rounded`: XLA takes a conversion there and back for nothing, and would find no error.
        scale = k_scale.astype(jnp.float32)[..., None]
        x = k.astype(jnp.float32)
        codes = jax.lax.reduce_precision(jnp.where(scale > 0, x / scale, 0), exponent_bits=5, mantissa_bits=3)
        largest = QUANTIZED["float8_e4m3fn"]
        error = x - jnp.clip(codes, -largest, largest) * scale
        return new | {"k_along": jnp.sum(error * axis, axis=-1).astype(SCALE_DTYPE)}


AXIS_ROWS, AXIS_STEPS = 64, 8


def main_axis(q: Float[Array, "b t n h"], valid: Int32[Array, " b"], kv_heads: int) -> Float[Array, "b k h"]:
    """The direction in which the last 64 valid queries of each KV head's group are largest: a unit vector, float32.

    Zero where there is no query. The first eigenvector of Σ q qᵀ, as far as squaring it eight times finds it.
    """
    b, t, n, h = q.shape
    rows = valid[:, None] - AXIS_ROWS + jnp.arange(AXIS_ROWS, dtype=jnp.int32)
    x = jnp.take_along_axis(q, jnp.clip(rows, 0, t - 1)[..., None, None], axis=1, mode="clip").astype(jnp.float32)
    x = jnp.where((rows >= 0)[..., None, None], x, 0).reshape(b, AXIS_ROWS, kv_heads, n // kv_heads, h)
    power = jnp.einsum("bpkgh,bpkgi->bkhi", x, x, precision=jax.lax.Precision.HIGHEST)

    def normalised(power: Array) -> Array:
        size = jnp.trace(power, axis1=-2, axis2=-1)[..., None, None]
        return power / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)

    power = normalised(power)
    for _ in range(AXIS_STEPS):
        power = normalised(jnp.einsum("bkhi,bkij->bkhj", power, power, precision=jax.lax.Precision.HIGHEST))
    largest = jnp.argmax(jnp.diagonal(power, axis1=-2, axis2=-1), axis=-1)
    axis = jnp.take_along_axis(power, largest[..., None, None], axis=-1, mode="clip")[..., 0]
    return axis / jnp.maximum(jnp.linalg.norm(axis, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def _delete(x: Array) -> None:
    """Frees the buffer of an array that has one, once what is being computed from it is done."""
    if not isinstance(x, Tracer) and not x.is_deleted():
        x.delete()


def quantize_rows(x: Float[Array, "*rows h"], dtype: Any) -> tuple[Array, Float[Array, "*rows"]]:
    """Each row divided by its factor and rounded to `dtype` (float8_e4m3fn or int8), and the factors."""
    largest = QUANTIZED[jnp.dtype(dtype).name]
    x = x.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(x), axis=-1) / largest).astype(SCALE_DTYPE)
    divisor = scale.astype(jnp.float32)[..., None]
    x = jnp.clip(jnp.where(divisor > 0, x / divisor, 0), -largest, largest)
    return (jnp.round(x) if jnp.dtype(dtype) == jnp.int8 else x).astype(dtype), scale


def cache_dtype(name: Any, model_dtype: Any) -> jnp.dtype:
    """The dtype of a cache by its name: None or "model" for the model's, "fp8", "int8", or any of these dtypes.

    Raises `ValueError` for another one.
    """
    if name is None or name == "model":
        return jnp.dtype(model_dtype)
    dtype = jnp.dtype(jnp.float8_e4m3fn if name == "fp8" else name)
    if dtype.name not in QUANTIZED and dtype != jnp.dtype(model_dtype):
        raise ValueError(f"a cache is in the model's dtype ({jnp.dtype(model_dtype)}), fp8 or int8; got {name}")
    return dtype
