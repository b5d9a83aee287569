"""Dual chunk attention: prompts longer than a model was trained for, by positions that stay within what it knows.

Positions are counted in chunks of C − w tokens (`chunk_size` C, `local_size` w). The distance that RoPE sees between a
query at place i of its chunk and a key at place j of its own is

- i − j in the same chunk;
- min(i + C − w, C) − j in the next one, so that the nearest w keys keep their true distance;
- C − j in all later ones.

None exceeds C, and up to C tokens all are the true ones: shorter prompts are read plainly, sparse patterns included.
The three cases are softmaxes over disjoint keys, merged by their log-sum-exps, as all blocks of keys are here. Keys are
rotated once, by j; a query by i, and further by what the case adds. A query's scores also grow with the length s of its
sequence, by 0.1 · ln(s / trained length) + 1, where the config names that length.

Cost: that of dense attention, in jnp, on every device. Sources: arXiv 2402.17463 (dual chunk attention) and 2501.15383
(Qwen2.5-1M).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from minference_jax.models.config import LlamaConfig
from minference_jax.models.rope import apply_rope, inverse_frequencies
from minference_jax.models.traits import DualChunk

ROWS, KEYS = 128, 1024
"""Queries and keys at once, at most: each block of either lies in one chunk."""


def chunks_for(config: LlamaConfig, extent: int) -> DualChunk | None:
    """The config's dual chunk attention, where sequences have room for `extent` (static) positions; None if plain.

    It goes by the room and not by the length: a cache holds keys that were rotated one way.
    """
    chunks = config.traits.dual_chunk
    return None if chunks is None or extent <= chunks.chunk_size else chunks


def outgrows(config: LlamaConfig, before: int, after: int) -> bool:
    """Whether the keys in a cache of `before` positions are rotated otherwise than one of `after` would have them."""
    return chunks_for(config, before) != chunks_for(config, max(before, after))


def places(chunks: DualChunk | None, positions: Int32[Array, "*rows"]) -> Int32[Array, "*rows"]:
    """What RoPE takes for the positions of queries and keys: their places in their chunks."""
    return positions if chunks is None else positions % chunks.stride


def dual_chunk_attention(
    config: LlamaConfig,
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    start: Int32[Array, "#b"],
    lengths: Int32[Array, " b"],
    whole: Int32[Array, " b"],
    turn: Callable[[Array], Array] = lambda q: q,
) -> Float[Array, "b t n h"]:
    """Rows at positions start … attend to the keys up to their own, those below `lengths`.

    q and k are rotated by their places. `turn`: what the cache of k does to queries (`KVCache.queries`). `whole`: the
    length of each sequence, by which scores grow. Rows at or past a length hold zeros.
    """
    chunks = config.traits.dual_chunk
    assert chunks is not None
    t = q.shape[1]
    rows, keys = min(math.gcd(chunks.stride, ROWS), t), math.gcd(chunks.stride, KEYS)
    q, k, v = _padded(q, rows), _padded(k, keys), _padded(v, keys)
    frequencies = inverse_frequencies(config, whole)[0]

    def sequence(q: Array, k: Array, v: Array, start: Array, length: Array, whole: Array) -> Array:
        def block(first: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(q, first, rows)
            part = part * _growth(chunks, whole).astype(part.dtype)
            queries = turn(_turned(chunks, frequencies, part, start + first))
            return _attend(chunks, queries, k, v, start + first, length, keys)

        firsts = rows * jnp.arange(q.shape[0] // rows, dtype=jnp.int32)
        out = block(firsts[0]) if len(firsts) == 1 else jax.lax.map(block, firsts)
        return out.reshape(q.shape)

    start = jnp.broadcast_to(start, lengths.shape)
    return jax.vmap(sequence)(q, k, v, start, lengths, whole)[:, :t]


def _padded(x: Array, block: int) -> Array:
    extra = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, extra), (0, 0), (0, 0)]) if extra else x


def _growth(chunks: DualChunk, whole: Int32[Array, ""]) -> Float[Array, ""]:
    if chunks.trained is None:
        return jnp.float32(1)
    return jnp.maximum(0.1 * jnp.log(whole.astype(jnp.float32) / chunks.trained) + 1, 1.0)


def _turned(
    chunks: DualChunk, frequencies: Float[Array, " r"], q: Float[Array, "t n h"], start: Int32[Array, ""]
) -> Float[Array, "3 t n h"]:
    """Queries at positions start … for keys of their own chunk, of the one before, and of those before that."""
    place = (start + jnp.arange(q.shape[0], dtype=jnp.int32)) % chunks.stride
    later = jnp.minimum(place + chunks.stride, chunks.chunk_size) - place
    angles = jnp.stack([later, chunks.chunk_size - place])[:, :, None].astype(jnp.float32) * frequencies
    further = apply_rope(jnp.broadcast_to(q, (2, *q.shape)), jnp.cos(angles), jnp.sin(angles))
    return jnp.concatenate([q[None], further])


def _attend(
    chunks: DualChunk,
    q: Float[Array, "3 t n h"],
    k: Float[Array, "s k h"],
    v: Float[Array, "s k h"],
    start: Int32[Array, ""],
    length: Int32[Array, ""],
    keys: int,
) -> Float[Array, "t n h"]:
    """One block of rows, all in one chunk, over blocks of keys."""
    t, n, h = q.shape[1:]
    positions = start + jnp.arange(t, dtype=jnp.int32)
    grouped = q.reshape(3, t, k.shape[1], -1, h)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    options = {"precision": precision, "preferred_element_type": jnp.float32}

    def step(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, total, top = state
        first = index * keys
        rows_k, rows_v = (jax.lax.dynamic_slice_in_dim(x, first, keys) for x in (k, v))
        case = jnp.clip(start // chunks.stride - first // chunks.stride, 0, 2)
        query = jax.lax.dynamic_index_in_dim(grouped, case, keepdims=False)
        scores = jnp.einsum("tkgh,skh->kgts", query, rows_k, **options) * h**-0.5
        of = first + jnp.arange(keys, dtype=jnp.int32)
        seen = (of[None] <= positions[:, None]) & (positions[:, None] < length)
        scores = jnp.where(seen, scores, -jnp.inf)
        new = jnp.maximum(top, jnp.max(scores, axis=-1))
        shift = jnp.where(jnp.isfinite(new), new, 0)
        weights, old = jnp.exp(scores - shift[..., None]), jnp.exp(top - shift)
        added = jnp.einsum("kgts,skh->kgth", weights.astype(v.dtype), rows_v, **options)
        return out * old[..., None] + added, total * old + jnp.sum(weights, axis=-1), new

    lead = (k.shape[1], n // k.shape[1], t)
    empty = jnp.zeros((*lead, h), jnp.float32), jnp.zeros(lead, jnp.float32), jnp.full(lead, -jnp.inf, jnp.float32)
    blocks = jnp.minimum((start + t + keys - 1) // keys, k.shape[0] // keys)
    out, total, _ = jax.lax.fori_loop(0, blocks, step, empty)
    out = jnp.where(total[..., None] > 0, out / jnp.where(total > 0, total, 1)[..., None], 0)
    return jnp.moveaxis(out, 2, 0).reshape(t, n, h).astype(q.dtype)
