"""A prompt in parts: each part runs against the cache of those before it, so memory is bounded by the part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from minference_jax.models.cache import KVCache
from minference_jax.planning.buckets import QUERY_TILE


class Part(NamedTuple):
    """State after a part: positions done, last-token logits of the sequences that have ended, cache, attention info."""

    done: int
    logits: Float[Array, "b vocab"]
    cache: KVCache
    info: Any


def prefill_parts(
    prefill: Callable[..., Any],
    tokens: Int32[Array, "b t"],
    lengths: Int32[Array, " b"],
    cache: KVCache,
    *,
    chunk: int,
    start: int = 0,
    **options: Any,
) -> Iterator[Part]:
    """Feeds `tokens`, which stand at positions `start` …, in parts of `chunk`, and yields after each.

    One program serves all parts; a last, shorter one is compiled separately, so pad to a multiple of `chunk`. Each
    part of a sparse model has an index of its own, estimated from the part's last rows, with the share of the
    budget that a part of its place needs (`models.part_attention`). With dense attention the results are those of
    one call but for rounding.

    `prefill`: that of a `Llama`; `options`: its other arguments. Raises `ValueError` for a chunk that is no positive
    multiple of 128.
    """
    if chunk <= 0 or chunk % QUERY_TILE:
        raise ValueError(f"chunk must be a positive multiple of {QUERY_TILE}, got {chunk}")
    logits: Array | None = None
    for first in range(0, tokens.shape[1], chunk):
        position = start + first
        # Traced, also where it is 0: all parts run the same program.
        result = prefill(
            tokens[:, first : first + chunk], lengths, cache, start=jnp.asarray(position, jnp.int32), **options
        )
        here, cache = result[:2]
        # A sequence's last token may lie in an earlier part.
        newest: Array = here if logits is None else _newer(lengths > position, here, logits)
        logits = newest
        yield Part(min(first + chunk, tokens.shape[1]), newest, cache, result[2] if len(result) > 2 else None)


@jax.jit
def _newer(is_here: Array, here: Array, before: Array) -> Array:
    return jnp.where(is_here[:, None], here, before)
