"""The KV cache: one static buffer for all layers, filled up to each sequence's length."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from minference_jax.models.config import LlamaConfig


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "tokens", "lengths"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after RoPE) and values of every layer, and the tokens they belong to. A frozen pytree of static shape.

    - `k`, `v`: `[layers, b, s, k, h]` in the model's dtype.
    - `tokens`: int32 `[b, s]`, so that a later turn can tell how much of its prompt is cached already.
    - `lengths`: int32 `[b]`, how many positions are filled. What lies at or past a length is never read.
    """

    k: Float[Array, "layers b s k h"]
    v: Float[Array, "layers b s k h"]
    tokens: Int32[Array, "b s"]
    lengths: Int32[Array, " b"]

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, length: int, dtype: jax.typing.DTypeLike) -> KVCache:
        """A cache for `batch` sequences of up to `length` tokens: 2 · layers · batch · length · k · h numbers."""
        if batch <= 0 or length <= 0:
            raise ValueError(f"a cache needs batch and length of at least 1, got {batch} and {length}")
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        return cls(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            tokens=jnp.zeros((batch, length), jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """Static number of positions per sequence."""
        return self.k.shape[2]

    def grown(self, length: int) -> KVCache:
        """This cache with room for at least `length` positions; itself if it has that already."""
        extra = length - self.capacity
        if extra <= 0:
            return self
        pad = partial(jnp.pad, mode="constant")
        room = ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0))
        return KVCache(pad(self.k, room), pad(self.v, room), pad(self.tokens, room[1:3]), self.lengths)


def decode_attention(
    q: Float[Array, "b n h"], k: Float[Array, "b s k h"], v: Float[Array, "b s k h"], lengths: Int32[Array, " b"]
) -> Float[Array, "b n h"]:
    """Dense attention of one query per sequence to its first `lengths` keys, with a float32 softmax.

    Decoding reads each key once for one query: it is bound by memory, so there is nothing for sparsity to win that
    a plain matrix-vector product does not have.
    """
    b, n, h = q.shape
    groups = n // k.shape[2]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = q.reshape(b, k.shape[2], groups, h)
    scores = jnp.einsum("bkgh,bskh->bkgs", q, k, precision=precision, preferred_element_type=jnp.float32) * h**-0.5
    valid = jnp.arange(k.shape[1])[None] < lengths[:, None]
    scores = jnp.where(valid[:, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgs,bskh->bkgh", weights, v, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(b, n, h).astype(q.dtype)
