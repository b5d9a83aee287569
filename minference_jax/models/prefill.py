"""The prefill of a model, whole or in parts: what is checked and chosen before its program runs."""

from __future__ import annotations

from typing import Any, TypedDict

import jax.numpy as jnp
from jaxtyping import Array, Int32

from minference_jax.models import forward, programs
from minference_jax.models.cache import KVCache
from minference_jax.models.checks import check_lengths, check_start, check_tokens
from minference_jax.models.dual_chunk import chunks_for
from minference_jax.models.parts import prefill_parts


class PrefillOptions(TypedDict, total=False):
    """Keywords of `Llama.prefill`, but for `return_info`."""

    start: int | Int32[Array, ""] | None
    rope_lengths: Int32[Array, " b"] | None
    chunk: int | None
    rows_at_once: int | None
    implementation: str | None


def prefill(
    model: Any,
    tokens: Any,
    lengths: Any,
    cache: KVCache | None,
    *,
    start: Any,
    rope_lengths: Any,
    rows_at_once: int | None,
    implementation: str | None,
    return_info: bool,
) -> Any:
    """`Llama.prefill` of a `model`, its tokens at once."""
    tokens, whole = check_tokens(tokens, None)
    start = check_start(start, tokens, cache)
    end = whole if start is None else whole + start
    lengths = end if lengths is None else jnp.maximum(check_lengths(lengths, tokens.shape[0]), 0)
    if start is None:
        lengths = jnp.minimum(lengths, whole)
    rope_lengths = jnp.minimum(lengths, end) if rope_lengths is None else check_lengths(rope_lengths, tokens.shape[0])
    at_once = forward.rows_at_once(*tokens.shape) if rows_at_once is None else rows_at_once
    if at_once <= 0:
        raise ValueError(f"rows_at_once must be positive, got {at_once}")
    extent = tokens.shape[1] if cache is None else cache.capacity
    patterns = model.patterns_for(tokens.shape[1], None if start is None else extent)
    if model.auto and chunks_for(model.config, extent) is not None:
        patterns = None
    result = programs.PREFILL(
        model.config,
        model.params(),
        patterns,
        *model.exchange.place(model.config, (tokens, lengths, rope_lengths)),
        cache,
        model.exchange.place(model.config, start),
        None if start is not None else model.order(tokens.shape[1]),
        rows_at_once=at_once,
        implementation=implementation,
        return_info=return_info,
        exchange=model.exchange,
    )
    return result if return_info else result[:2]


def prefill_in_parts(
    model: Any,
    tokens: Any,
    lengths: Any,
    cache: KVCache | None,
    *,
    chunk: int,
    start: Any,
    rope_lengths: Any,
    **options: Any,
) -> Any:
    """`Llama.prefill` of a `model`, in parts of `chunk` tokens."""
    if cache is None or not (start is None or isinstance(start, int)):
        raise ValueError("chunk needs a cache, and a start that is None or an int")
    tokens, whole = check_tokens(tokens, None)
    start = start or 0
    check_start(start, tokens, cache)
    end = whole + start
    lengths = end if lengths is None else jnp.maximum(check_lengths(lengths, tokens.shape[0]), 0)
    rope_lengths = jnp.minimum(lengths, end) if rope_lengths is None else rope_lengths
    lengths = model.exchange.place(model.config, lengths)
    done = list(
        prefill_parts(
            model.prefill, tokens, lengths, cache, chunk=chunk, start=start, rope_lengths=rope_lengths, **options
        )
    )
    result = done[-1].logits, done[-1].cache
    return (*result, tuple(part.info for part in done)) if options["return_info"] else result
