"""Attention to a window of the last tokens, exact to the token, for layers that have one.

Blocks of queries attend to the keys that any of their windows reach, and to no others, so the cost grows with the
prompt times the window. jnp on every device: windows are short beside what the other layers see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from minference_jax.models.cache import KVCache
from minference_jax.models.config import LlamaConfig

BLOCK = 512
"""Queries at once, at least: their scores are BLOCK × (BLOCK + window) numbers a head."""


def window_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    window: int,
    *,
    lengths: Int32[Array, " b"],
    q_offset: Int32[Array, ""] | int,
    first_key: Int32[Array, ""] | int = 0,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Row at position p attends to keys p - window + 1 … p, those below `lengths`. Softmax in float32.

    **Arguments:** `q_offset`, `first_key`: positions of the first query and of the first key. `window`: static.

    **Returns:** the output in q's dtype and the log-sum-exp of each row's scores. Rows at or past a length hold zeros,
    and minus infinity.
    """
    t, s = q.shape[1], k.shape[1]
    block = min(t, max(BLOCK, window))
    span = min(s, block + window)

    def attend(start: Int32[Array, ""], rows: int) -> tuple[Array, Array]:
        queries = jax.lax.dynamic_slice_in_dim(q, start, rows, axis=1)
        place = jnp.clip(q_offset + start - window + 1 - first_key, 0, s - span)
        keys, values = (jax.lax.dynamic_slice_in_dim(x, place, span, axis=1) for x in (k, v))
        at = q_offset + start + jnp.arange(rows, dtype=jnp.int32)
        of = first_key + place + jnp.arange(span, dtype=jnp.int32)
        seen = (of[None] <= at[:, None]) & (of[None] > at[:, None] - window)
        seen = seen[None] & (at[None, :, None] < lengths[:, None, None])
        return _softmax(queries, keys, values, seen)

    if t == block:
        return attend(jnp.int32(0), t)
    whole = t // block
    starts = block * jnp.arange(whole, dtype=jnp.int32)
    out, lse = jax.lax.map(lambda start: attend(start, block), starts)
    out, lse = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], whole * block, *x.shape[3:]) for x in (out, lse))
    if t % block:
        last = attend(jnp.int32(whole * block), t % block)
        out, lse = (jnp.concatenate(pair, axis=1) for pair in zip((out, lse), last, strict=True))
    return out, lse


def _softmax(q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, Array]:
    """Attention of `[b, t, n, h]` to the keys where `seen` `[b, t, s]`, and its log-sum-exp."""
    b, t, n, h = q.shape
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    grouped = q.reshape(b, t, k.shape[2], -1, h)
    options = {"precision": precision, "preferred_element_type": jnp.float32}
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, **options) * h**-0.5
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(seen[:, None, None], jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0)[..., None]), 0)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v, **options)
    return out.astype(q.dtype).reshape(b, t, n, h), jnp.moveaxis(lse, 3, 1).reshape(b, t, n)


def attend_layer(
    config: LlamaConfig,
    layer: Int32[Array, ""],
    qkv: tuple[Float[Array, "b t n h"], Float[Array, "b t k h"], Float[Array, "b t k h"]],
    cache: KVCache | None,
    whole: Callable[[], tuple[Array, Any, Array | None]],
    *,
    start: Int32[Array, ""] | None,
    lengths: Int32[Array, " b"],
    own: Callable[[Array], Array] = lambda out: out,
    sinks: Float[Array, " n"] | None = None,
    unspent: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, "b own n h"], Any, Float[Array, " b"] | None]:
    """Attention of one layer's prefill: to its window where it has one, else `whole()`, which also says what it did
    and what it leaves to later layers (of the `unspent` before it).

    `start` None: the rows are the whole prompt. Otherwise they stand at positions start … of the cache. Of a layer with
    a window the information is all ones. `own`: which rows of a window's output to keep, as `whole` does. `sinks`: see
    `with_sinks`; `whole` has its own.
    """
    window = config.sliding_window
    if window is None or window >= (qkv[0].shape[1] if start is None or cache is None else cache.capacity):
        return whole()  # no window hides anything

    def windowed() -> tuple[Array, Any, Array | None]:
        if start is None or cache is None:
            found = window_attention(*qkv, window, lengths=lengths, q_offset=0)
        else:
            found = cache_window(config, qkv[0], cache, layer, start=start, lengths=lengths)
        info = jax.eval_shape(whole)[1]
        out = own(with_sinks(found[0], found[1], sinks))
        return out, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), info), unspent

    return _choose(config, layer, windowed, whole)


def decode_layer(
    config: LlamaConfig,
    layer: Int32[Array, ""],
    q: Float[Array, "b n h"],
    cache: KVCache,
    lengths: Int32[Array, " b"],
    sinks: Float[Array, " n"] | None = None,
) -> Float[Array, "b n h"]:
    """Attention of one query a sequence, at position lengths - 1, to a layer's window or to all of its cache."""

    def windowed() -> tuple[Array, Array]:
        return decode_window(config, q, cache, layer, lengths)

    def whole() -> tuple[Array, Array]:
        return cache.attend(layer, q, lengths)

    hides = config.sliding_window is not None and config.sliding_window < cache.capacity
    found: Any = _choose(config, layer, windowed, whole) if hides else whole()
    return with_sinks(found[0], found[1], sinks)


def _choose(config: LlamaConfig, layer: Int32[Array, ""], windowed: Callable[[], Any], whole: Callable[[], Any]) -> Any:
    """`windowed()` where the layer (its number may be traced) has a window, else `whole()`; of one structure."""
    flags = [kind.window for kind in config.layer_kinds]
    if not any(flags):
        return whole()
    if all(flags):
        return windowed()
    return jax.lax.cond(jnp.asarray(flags)[layer], windowed, whole)


def cache_window(
    config: LlamaConfig,
    q: Float[Array, "b t n h"],
    cache: KVCache,
    layer: Int32[Array, ""],
    *,
    start: Int32[Array, ""],
    lengths: Int32[Array, " b"],
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """`window_attention` of a part of a prompt, at positions start …, to one layer of the cache that holds it."""
    assert config.sliding_window is not None
    rows = min(cache.capacity, q.shape[1] + config.sliding_window)
    first = jnp.clip(start - config.sliding_window + 1, 0, cache.capacity - rows)
    k, v = cache.read(layer, q.dtype, rows, first)
    where = {"lengths": lengths, "q_offset": start, "first_key": first}
    return window_attention(cache.queries(q), k, v, config.sliding_window, **where)


def decode_window(
    config: LlamaConfig, q: Float[Array, "b n h"], cache: KVCache, layer: Int32[Array, ""], lengths: Int32[Array, " b"]
) -> tuple[Float[Array, "b n h"], Float[Array, "b n"]]:
    """One query a sequence, at position lengths - 1, to the last keys of a layer of the cache."""
    assert config.sliding_window is not None
    rows = min(cache.capacity, config.sliding_window)
    first = jnp.clip(lengths - config.sliding_window, 0, cache.capacity - rows)
    k, v = cache.read_from(layer, q.dtype, first, rows)
    at = first[:, None] + jnp.arange(rows, dtype=jnp.int32)
    seen = (at < lengths[:, None]) & (at >= lengths[:, None] - config.sliding_window)
    out, lse = _softmax(cache.queries(q)[:, None], k, v, seen[:, None])
    return out[:, 0], lse[:, 0]


def with_sinks(
    out: Float[Array, "*rows n h"], lse: Float[Array, "*rows n"], sinks: Float[Array, " n"] | None
) -> Float[Array, "*rows n h"]:
    """Attention with one more score a head that has no value: the softmax's sum grows by exp(sink). None: as it is."""
    if sinks is None:
        return out
    share = jax.nn.sigmoid(lse - sinks.astype(jnp.float32))
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)
