"""The forward pass over stacked parameters, as pure functions: prefill, one decoding step, logits.

Layers are scanned, so a model of any depth compiles one layer. The residual stream and the KV cache are the scan's
carry and are updated in place; parameters and head patterns are its inputs.

On a mesh these functions run inside `jax.shard_map`: every device holds its slices of parameters, patterns and cache,
and some rows of the prompt. `Exchange` says what devices send each other; on one device it does nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

import pallas_kernels
from minference_jax.models.cache import KVCache
from minference_jax.models.chunks import Slice, map_chunks, plain
from minference_jax.models.config import LlamaConfig
from minference_jax.models.dual_chunk import chunks_for, dual_chunk_attention, places
from minference_jax.models.layers import enter_attention, finish_layer, leave_layer, project_qkv
from minference_jax.models.norms import norm
from minference_jax.models.part_attention import attend_to_cache
from minference_jax.models.residual import Residual
from minference_jax.models.rope import LayerRope, Turns, layer_rope, turns
from minference_jax.models.stacked import Layer, StackedLayer
from minference_jax.models.window import attend_layer, decode_layer, with_sinks
from minference_jax.parallel.exchange import ONE, Exchange
from minference_jax.parallel.specs import is_fp8
from minference_jax.parallel.stream import cut, to_heads, to_rows, whole
from pallas_kernels.device import Device
from pallas_kernels.tracing import vary_alike

Params = Mapping[str, Array]

CHUNK = 16_384
"""Rows that projections, norms and the MLP process at once: large enough to fill a GPU, and 0.5 GB for an 8B model."""
WHOLE = 32_768
"""Rows of all sequences up to which none are cut: in chunks they would be copied in and out again."""
LOGIT_CHUNK = 256
"""Rows whose logits exist at once when only a number per row is kept: 134 MB for a vocabulary of 131,072."""


def rows_at_once(batch: int, rows: int) -> int:
    """Rows that projections, norms and the MLP of so many sequences process at once, by default."""
    return rows if batch * rows <= WHOLE else CHUNK


def stacked_layers(params: Params) -> Layer:
    """The parameters that have a leading layer axis, without their `layers.` prefix."""
    return {name.removeprefix("layers."): value for name, value in params.items() if name.startswith("layers.")}


def _mixed(config: LlamaConfig) -> bool:
    """Whether some layers have parameters that others have not, so that a scan cannot slice them all."""
    return config.traits.experts is not None and config.traits.experts.first > 0


def embed(
    config: LlamaConfig, params: Params, tokens: Int32[Array, "b t"], exchange: Exchange = ONE
) -> Float[Array, "b t d"]:
    """Token embeddings; ids outside the vocabulary are clipped into it."""
    x = exchange.take(config, params["embed"], tokens)
    return x if config.traits.embed_scale == 1 else x * jnp.asarray(config.traits.embed_scale, x.dtype)


def logits(
    config: LlamaConfig, params: Params, x: Float[Array, "b t d"], exchange: Exchange = ONE
) -> Float[Array, "b t vocab"]:
    """Final norm and head, float32. Each device of a mesh may have a slice of the head; x is then the same on all."""
    if x.shape[0] * x.shape[1] > 1 or not is_fp8(params) or Device.default().platform != "gpu":
        return _head(config, params, x, exchange)
    # With a second row, of zeros: of one alone XLA makes a product in float32 where it has no Triton products
    # (`programs`), and for that a float32 copy of the head: 2 GB of an 8B model.
    return _head(config, params, jnp.pad(x, ((0, 0), (0, 1), (0, 0))), exchange)[:, :1]


def _head(config: LlamaConfig, params: Params, x: Float[Array, "b t d"], exchange: Exchange) -> Array:
    x = norm(config, x, params["final_norm"])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    head, equation = (params["embed"], "btd,vd->btv") if config.tie_embeddings else (params["lm_head"], "btd,dv->btv")
    y = jnp.einsum(equation, x, head, precision=precision, preferred_element_type=jnp.float32)
    y = exchange.join(config, y)
    y = y if config.traits.logit_divisor == 1 else y / config.traits.logit_divisor
    cap = config.traits.logit_cap
    return y if cap is None else cap * jnp.tanh(y / cap)


def layer_qkv(
    config: LlamaConfig, layer: Layer, x: Float[Array, "b t d"], rope: LayerRope, positions: Int32[Array, " t"]
) -> tuple[Array, Array, Array]:
    """One layer's q `[b, t, n, h]`, k and v `[b, t, k, h]` for rows at these positions, in chunks."""
    chunk = rows_at_once(*x.shape[:2])
    q, k, v = to_heads(ONE, partial(_project, config, layer, rope), (x,), positions[None], x.shape[1], chunk)
    return q, k, v


def _project(config: LlamaConfig, layer: Layer, rope: LayerRope, rows: Slice, positions: Array) -> Any:
    return project_qkv(config, layer, rows, turns(config, rope, positions))


def attend(
    q: Array,
    k: Array,
    v: Array,
    patterns: Any,
    *,
    lengths: Array,
    q_offset: Any,
    implementation: str | None,
    return_info: bool = False,
    exchange: Exchange = ONE,
    sinks: Array | None = None,
) -> tuple[Array, Any, Array | None]:
    """Attention of one layer's prefill; with `return_info`, what is known about it: None when it is dense; and what is
    left to later layers (`LayerPatterns.unspent`).

    Where several devices have these heads, each returns its own rows. `sinks`: a score of each head that has no key
    (`with_sinks`).
    """
    where: dict[str, Any] = {"lengths": lengths, "q_offset": q_offset, "implementation": implementation}
    where["return_lse"] = sinks is not None
    found: Any
    info = left = None
    if patterns is None:

        def dense(q: Array, k: Array, v: Array, _: None, q_offset: Any) -> Any:
            return pallas_kernels.dense_attention(q, k, v, **where | {"q_offset": q_offset})

        zigzag = exchange.zigzag
        inputs = (q, k, v, None, q_offset)
        found = dense(*inputs) if zigzag is None else zigzag.attend(dense, *inputs)
    else:
        from minference_jax.attention import sparse_attention  # a dense model needs no index

        mesh: Any = {"axis_name": exchange.axis_name, "zigzag": exchange.zigzag}
        answer: Any = sparse_attention(q, k, v, patterns, **where, return_info=return_info, **mesh)
        answer = list(answer) if isinstance(answer, tuple) else [answer]
        left = answer.pop() if patterns.unspent is not None else None
        info = answer.pop() if return_info else None
        found = answer[0] if sinks is None else answer
    return (found if sinks is None else with_sinks(found[0], found[1], sinks)), info, left


def in_order(x: Float[Array, "b t n h"], order: Int32[Array, " k"]) -> Float[Array, "b t n h"]:
    """Heads with their KV groups in this order."""
    return jnp.take(x, of_heads(order, x.shape[2]), axis=2)


def of_heads(order: Int32[Array, "*layers k"], heads: int) -> Int32[Array, "*layers n"]:
    """The order of so many heads from that of their KV groups."""
    group = heads // order.shape[-1]
    each = group * order[..., None] + jnp.arange(group, dtype=jnp.int32)
    return each.reshape(*order.shape[:-1], heads)


def prefill(
    config: LlamaConfig,
    params: Params,
    patterns: Any,
    tokens: Int32[Array, "b t"],
    lengths: Int32[Array, " b"],
    rope_lengths: Int32[Array, " b"],
    cache: KVCache | None,
    start: Int32[Array, ""] | None,
    *,
    keep: str = "nothing",
    chunk: int | None = None,
    implementation: str | None = None,
    exchange: Exchange = ONE,
    order: Int32[Array, "layers k"] | None = None,
) -> tuple[Float[Array, "b rows d"], KVCache | None, Any]:
    """Runs all layers over a prompt or a part of one.

    `start` None: the rows are the whole prompt, and attend to each other. Otherwise they stand at positions start…,
    and attend to the cache, which holds everything before them. `keep` says what to return of each layer, stacked:
    "nothing", "info" (of its attention) or "hidden" (its output). Returns the last layer's output, before the final
    norm, with the cache and what was kept; on a mesh, a device's own rows of outputs. `order`: of the KV groups inside
    attention, with `start` None; patterns are in that order, and so is what is known of attention.
    """
    t = tokens.shape[1]
    chunk = rows_at_once(*tokens.shape) if chunk is None else chunk
    q_offset = jnp.int32(0) if start is None else start
    seen = jnp.minimum(lengths, q_offset + t)
    chunks = chunks_for(config, t if cache is None else cache.capacity)
    if chunks is not None and (patterns is not None or exchange.zigzag is not None):
        what = "sparse patterns" if patterns is not None else "a mesh with rows"
        raise ValueError(
            f"{what} cannot be combined with dual chunk attention, which this model has where there is room for more "
            f"than {chunks.chunk_size:,} tokens: use dense attention (and a mesh of heads), or shorter prompts"
        )
    positions = places(chunks, q_offset + exchange.positions(t))

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, Any]:
        x, cache, unspent = carry
        index, layer, layer_patterns, order = inputs
        if unspent is not None:
            layer_patterns = dataclasses.replace(layer_patterns, unspent=unspent)
        layer = exchange.whole_layer(config, StackedLayer(stacked, index) if layer is None else layer)
        rope = layer_rope(config, rope_lengths, index)

        def projected(rows: Slice, positions: Array) -> tuple[Array, ...]:
            qkv = _project(config, layer, rope, rows, positions)
            if order is None:
                return qkv
            qkv = tuple(map(plain, qkv))
            kept = () if cache is None else qkv[1:]  # a cache has the model's order of heads
            return (*(in_order(y, order) for y in qkv), *kept)

        q, k, v, *kept = to_heads(exchange, projected, x, positions[None], t, chunk)
        if cache is not None:
            cache = cache.write(index, q_offset, *(kept or (k, v)))

        sinks = layer.get("sinks")
        options = {"implementation": implementation, "return_info": keep == "info"}
        served = partial(attend, **options, exchange=exchange, sinks=sinks)

        def attended() -> tuple[Array, Any, Array | None]:
            if chunks is not None:
                options = {"start": q_offset[None], "lengths": seen, "whole": rope_lengths}
                if start is None or cache is None:
                    return dual_chunk_attention(config, q, k, v, **options), None, None
                kv = cache.read(index, q.dtype)
                return dual_chunk_attention(config, q, *kv, **options, turn=cache.queries), None, None
            if start is None or cache is None:
                return served(q, k, v, layer_patterns, lengths=seen, q_offset=0)
            return attend_to_cache(served, q, cache, index, layer_patterns, start=start, lengths=lengths)

        where = {"start": start, "lengths": seen, "own": exchange.own_queries, "sinks": sinks, "unspent": unspent}
        out, info, unspent = attend_layer(config, index, (q, k, v), cache, attended, **where)
        out, layer = exchange.together(out, layer)
        back = None if order is None else jnp.argsort(order)

        def finished(x: Slice, out: Slice) -> Array:
            return finish_layer(config, layer, x, out if back is None else in_order(out.rows, back))

        x = to_rows(exchange, finished, x, out, chunk)
        hidden = whole(x) if keep == "hidden" else None
        return (x, cache, unspent), {"nothing": None, "info": info, "hidden": hidden}[keep]

    indices = jnp.arange(config.num_layers, dtype=jnp.int32)
    stacked = stacked_layers(params)
    table = exchange.whole(config, params, "embed")
    unspent = None if patterns is None else patterns.begin(tokens.shape[0])
    x = cut(exchange, embed(config, table, exchange.own_rows(tokens)), chunk)
    carry = vary_alike((x, cache, unspent), lengths)
    inputs = (indices, None if _mixed(config) else stacked, patterns, order)
    (x, cache, _), kept = jax.lax.scan(step, carry, inputs)
    if cache is not None:
        written = jax.lax.dynamic_update_slice(cache.tokens, tokens, (jnp.int32(0), q_offset))
        cache = dataclasses.replace(cache, tokens=written, lengths=seen)
    return whole(x), cache, kept


def last_logits(
    config: LlamaConfig,
    params: Params,
    x: Float[Array, "b t d"],
    last: Int32[Array, " b"],
    t: int,
    exchange: Exchange = ONE,
) -> Float[Array, "b vocab"]:
    """Logits of one row per sequence, `last` (clipped to the t rows of the prompt)."""
    return logits(config, params, exchange.row(x, last, t), exchange)[:, 0]


def decode(
    config: LlamaConfig,
    params: Params,
    tokens: Int32[Array, " b"],
    cache: KVCache,
    active: Array | None = None,
    exchange: Exchange = ONE,
) -> tuple[Float[Array, "b vocab"], KVCache]:
    """Appends one token to each sequence: its logits, and the cache one longer.

    Rows where `active` is False keep their length (what they write is past it); their logits mean nothing. A row whose
    cache is full writes nothing.
    """
    rows, positions = jnp.arange(tokens.shape[0], dtype=jnp.int32), cache.lengths
    chunks = chunks_for(config, cache.capacity)
    stacked = stacked_layers(params)
    lengths = positions + 1

    def turns_of(index: Array) -> Turns:
        found = turns(config, layer_rope(config, lengths, index), places(chunks, positions)[:, None])
        return jax.tree.map(lambda x: x[:, 0], found)

    # Of all layers, before the loop: in it each of these small steps would be a kernel of its own.
    angles = jax.vmap(turns_of)(jnp.arange(config.num_layers, dtype=jnp.int32))

    def step(index: Array, carry: tuple) -> tuple:
        stream, cache = carry
        layer = exchange.layer(config, stacked, index)
        x, (q, k, v) = enter_attention(config, layer, stream)
        q, cache = cache.append_rotated(index, positions, q[:, 0], k[:, 0], v[:, 0], angles, config.traits.neighbours)
        if chunks is None:
            out = decode_layer(config, index, q, cache, lengths, layer.get("sinks"))[:, None]
        else:
            options = {"start": positions, "lengths": lengths, "whole": lengths}
            kv = cache.read(index, q.dtype)
            out = dual_chunk_attention(config, q[:, None], *kv, **options, turn=cache.queries)
        x, added = leave_layer(config, layer, x, out, jnp.float32)
        return Residual(x, added.astype(jnp.float32)), cache

    x = embed(config, params, tokens[:, None], exchange)
    stream = Residual(x, jnp.zeros(x.shape, jnp.float32))
    stream, cache = jax.lax.fori_loop(0, config.num_layers, step, (stream, cache))
    written = cache.tokens.at[rows, positions].set(tokens, mode="drop")
    longer = positions + (1 if active is None else active.astype(jnp.int32))
    cache = dataclasses.replace(cache, tokens=written, lengths=jnp.minimum(longer, cache.capacity))
    return _head(config, params, stream.whole(), exchange)[:, 0], cache


def log_likelihoods(
    config: LlamaConfig,
    params: Params,
    x: Float[Array, "b rows d"],
    tokens: Int32[Array, "b t"],
    lengths: Int32[Array, " b"],
    exchange: Exchange = ONE,
) -> Float[Array, "b t"]:
    """log p(token i | tokens before it), float32, from the last layer's output; 0 for the first token and padding.

    Logits exist for `LOGIT_CHUNK` rows at a time. On a mesh, x holds a device's own rows and the result is all of them.
    """
    head = exchange.whole(config, params, "embed" if config.tie_embeddings else "lm_head")

    def score(rows: Slice, following: Slice) -> Array:
        values = logits(config, head, rows.rows)
        picked = jnp.take_along_axis(values, following.rows[:, :, None], axis=-1, mode="clip")[:, :, 0]
        return picked - jax.nn.logsumexp(values, axis=-1)

    following = exchange.own_rows(jnp.roll(tokens, -1, axis=1))
    scores = exchange.all_rows(map_chunks(score, (x, following), LOGIT_CHUNK), tokens.shape[1])
    scores = jnp.roll(scores, 1, axis=1)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return jnp.where((positions > 0) & (positions < lengths[:, None]), scores, 0.0)
