"""The KV cache: one static buffer for all layers, filled up to each sequence's length, in 16 or 8 bits a number."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int32

from minference_jax.models.chunks import Slice, map_chunks
from minference_jax.models.config import LlamaConfig
from minference_jax.models.rope import Turns, apply_rope
from minference_jax.models.rounding import QUANTIZED, SCALE_DTYPE, quantize_rows, turned
from pallas_kernels.checks import check_whole
from pallas_kernels.decode.append import rotate_and_append, unsupported_reason
from pallas_kernels.decode.attention import decode_attention, dequantize
from pallas_kernels.decode.narrow import moved

CHUNK = 16_384
"""Tokens that are quantized at once."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "tokens", "lengths", "k_scale", "v_scale"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after RoPE) and values of every layer, and the tokens they belong to. A frozen pytree of static shape.

    - `k`, `v`: `[layers, b, s, k, h]` in the model's dtype, float8_e4m3fn or int8.
    - `tokens`: int32 `[b, s]`, so that a later turn can tell how much of its prompt is cached already.
    - `lengths`: int32 `[b]`, how many positions are filled. What lies at or past a length is never read.
    - `k_scale`, `v_scale`: `[layers, b, s, k]`, the factor of each head's row; None unless quantized.

    A quantized row is rounded to 3 bits of mantissa (float8_e4m3fn) or to 1/127 of its largest number (int8), with a
    factor for each token and head: no calibration, and what was written never has to change. Quantized keys are stored
    turned, see `models.rounding`; `queries` turns what is to be multiplied with them.
    """

    k: Float[Array, "layers b s k h"]
    v: Float[Array, "layers b s k h"]
    tokens: Int32[Array, "b s"]
    lengths: Int32[Array, " b"]
    k_scale: Float[Array, "layers b s k"] | None = None
    v_scale: Float[Array, "layers b s k"] | None = None

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, length: int, dtype: jax.typing.DTypeLike) -> KVCache:
        """A cache for `batch` sequences of up to `length` tokens: 2 · layers · batch · length · k · h numbers.

        `dtype`: a floating dtype, or float8_e4m3fn or int8 for a quantized cache.
        """
        if min(check_whole("batch", batch, 0), check_whole("length", length, 0)) == 0:
            raise ValueError(f"a cache needs batch and length of at least 1, got {batch} and {length}")
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        scale = partial(jnp.zeros, shape[:-1], SCALE_DTYPE) if jnp.dtype(dtype).name in QUANTIZED else lambda: None
        return cls(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            tokens=jnp.zeros((batch, length), jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
            k_scale=scale(),
            v_scale=scale(),
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

    def write(self, layer: Array, start: Array, k: Float[Array, "b t k h"], v: Float[Array, "b t k h"]) -> KVCache:
        """With the rows of one layer at positions start, start + 1, … replaced; tokens and lengths stay."""

        # In chunks: what compares the factors of a million rows must not exist for all of them at once.
        def encoded(k: Slice, v: Slice) -> dict[str, Array]:
            return self._encoded(k.rows, v.rows)

        new = {"k": k, "v": v} if self.k_scale is None else map_chunks(encoded, (k, v), CHUNK)
        return dataclasses.replace(
            self,
            **{
                name: moved(
                    partial(jax.lax.dynamic_update_slice, start_indices=(layer, 0, start, *(0,) * (x.ndim - 3))),
                    *(x, new[name][None]),
                )
                for name, x in self._rows().items()
            },
        )

    def append(
        self, layer: Array, positions: Int32[Array, " b"], k: Float[Array, "b k h"], v: Float[Array, "b k h"]
    ) -> KVCache:
        """With one row of each sequence replaced; a position past the end writes nothing."""
        new, rows = self._encoded(k, v), jnp.arange(positions.shape[0], dtype=jnp.int32)

        def put(x: Array, new: Array) -> Array:
            return x.at[layer, rows, positions].set(new, mode="drop")

        return dataclasses.replace(self, **{name: moved(put, x, new[name]) for name, x in self._rows().items()})

    def append_rotated(
        self,
        layer: Array,
        positions: Int32[Array, " b"],
        q: Float[Array, "b n h"],
        k: Float[Array, "b k h"],
        v: Float[Array, "b k h"],
        turns: Turns,
        neighbours: bool,
    ) -> tuple[Float[Array, "b n h"], KVCache]:
        """Queries after RoPE, and `append` of keys after RoPE and values. `turns`: of all layers, `[layers, b, r]`."""

        def plain(q: Array, k: Array, v: Array, cache: KVCache, turns: Turns) -> tuple[Array, KVCache]:
            own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)[:, None], turns)
            q = apply_rope(q[:, None], own.cos, own.sin, own.queries, neighbours)[:, 0]
            k = apply_rope(k[:, None], own.cos, own.sin, neighbours=neighbours)[:, 0]
            return q, cache.append(layer, positions, k, v)

        def kernel(q: Array, k: Array, v: Array, cache: KVCache, turns: Turns) -> tuple[Array, KVCache]:
            q, *kv = rotate_and_append(q, k, v, *turns, cache.k, cache.v, layer, positions)
            return q, dataclasses.replace(cache, k=kv[0], v=kv[1])

        if neighbours or unsupported_reason(q, turns.cos, self.k) is not None:
            return plain(q, k, v, self, turns)
        return jax.lax.platform_dependent(q, k, v, self, turns, cuda=kernel, default=plain)

    def read(
        self, layer: Array | int, dtype: Any, extent: int | None = None, start: Array | int = 0
    ) -> tuple[Float[Array, "b s k h"], Float[Array, "b s k h"]]:
        """Keys and values of one layer in `dtype`, of `extent` positions from `start` on (extent static; None: all).

        Keys of a quantized cache are turned, as `queries` turns queries.
        """
        extent = self.capacity if extent is None else extent

        def first(x: Array) -> Array:
            size = (1, x.shape[1], extent, *x.shape[3:])
            return moved(lambda x: jax.lax.dynamic_slice(x, (layer, 0, start, *(0,) * (x.ndim - 3)), size)[0], x)

        return self._decoded({name: first(x) for name, x in self._rows().items()}, dtype)

    def read_from(
        self, layer: Array | int, dtype: Any, starts: Int32[Array, " b"], extent: int
    ) -> tuple[Float[Array, "b s k h"], Float[Array, "b s k h"]]:
        """As `read`, with a start of its own for each sequence."""

        def rows(x: Array) -> Array:
            def one(x: Array, start: Array) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, start, extent, axis=0)

            return moved(lambda x: jax.vmap(one)(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), starts), x)

        return self._decoded({name: rows(x) for name, x in self._rows().items()}, dtype)

    def _decoded(self, rows: dict[str, Array], dtype: Any) -> tuple[Array, Array]:
        if self.k_scale is None:
            return rows["k"], rows["v"]
        return dequantize(rows["k"], rows["k_scale"], dtype), dequantize(rows["v"], rows["v_scale"], dtype)

    def attend(
        self, layer: Array, q: Float[Array, "b n h"], lengths: Int32[Array, " b"]
    ) -> tuple[Float[Array, "b n h"], Float[Array, "b n"]]:
        """Dense attention of one query per sequence to the first `lengths` positions of a layer; its log-sum-exp."""
        q = self.queries(q)
        scales: dict[str, Any] = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return decode_attention(q, self.k, self.v, layer, lengths, **scales, return_lse=True)

    def queries(self, q: Float[Array, "*rows h"]) -> Float[Array, "*rows h"]:
        """Queries as the keys of this cache are stored: turned if it is quantized."""
        return q if self.k_scale is None else turned(q)

    def _rows(self) -> dict[str, Array]:
        """What is stored of each layer and position."""
        rows = {"k": self.k, "v": self.v, "k_scale": self.k_scale, "v_scale": self.v_scale}
        return {name: x for name, x in rows.items() if x is not None}

    def _encoded(self, k: Array, v: Array) -> dict[str, Array]:
        if self.k_scale is None:
            return {"k": k, "v": v}
        (k, k_scale), (v, v_scale) = quantize_rows(turned(k), self.k.dtype), quantize_rows(v, self.v.dtype)
        return {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}


def _delete(x: Array) -> None:
    """Frees the buffer of an array that has one, once what is being computed from it is done."""
    if not isinstance(x, Tracer) and not x.is_deleted():
        x.delete()


def cache_dtype(name: Any, model_dtype: Any) -> jnp.dtype:
    """The dtype of a cache by its name: None or "model" for the model's, "fp8", "int8", or any of these dtypes.

    Raises `ValueError` for another one.
    """
    if name is None or name == "model":
        return jnp.dtype(model_dtype)
    try:
        dtype = jnp.dtype(jnp.float8_e4m3fn if name == "fp8" else name)
    except TypeError:
        raise ValueError(f"a cache is in the model's dtype, fp8 or int8; got {name!r}") from None
    if dtype.name not in QUANTIZED and dtype != jnp.dtype(model_dtype):
        raise ValueError(f"a cache is in the model's dtype ({jnp.dtype(model_dtype)}), fp8 or int8; got {name}")
    return dtype
