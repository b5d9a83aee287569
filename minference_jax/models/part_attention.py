"""Attention of one part of a prompt to the cache: to as much of it as the part can see, with the budget it needs.

A cache has room for the whole prompt. Copying a layer out of it, and estimating an index over all of it, would make
eight parts pay for eight whole prompts. So one of a few static prefixes of the cache is read, the smallest that reaches
the part's end.

A budget is meant for the whole prompt. In one call, rows near the start spend less of it: columns after them, and bands
that reach back before the prompt, show them nothing. A part that ends at e of s tokens takes √(e / s) of the columns
and slashes (`LayerPatterns.for_part`). On 4,096 tokens of text in eight parts (SmolLM2, 36 heads, 128 columns and 14
tiles) the eight then hold .99, .95, .93, .92, .92, .91, .92 and .92 of the softmax mass; one call holds 1.0, .98, .95,
.93, .92, .92, .92 and .92 of the same rows. With e / s an early part falls below the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from minference_jax.models.cache import KVCache
from minference_jax.patterns.heads import LayerPatterns
from pallas_kernels.sizes import QUERY_TILE

EXTENTS = 4
"""Prefixes of a cache: its quarters, as far as they are longer than a part. Each is compiled, which takes about four
seconds beside an H100; eight of them took one part's program past a minute, for one per cent of its time."""

SHORT = 16_384
"""Up to so many positions a cache is read whole: what a prefix would save is less than it takes to compile."""


def prefix_extents(rows: int, capacity: int, short: int | None = None) -> list[int]:
    """Lengths, ascending, of the prefixes that a part of `rows` may read; the last is the whole cache.

    `short`: the longest cache that is always read whole, by default `SHORT`.
    """
    if capacity <= (SHORT if short is None else short):
        return [capacity]
    # No more of them than parts: a prefix that ends inside a part helps none.
    number = max(1, min(EXTENTS, capacity // rows))
    step = -(-capacity // (number * QUERY_TILE)) * QUERY_TILE
    return sorted({min(capacity, i * step) for i in range(1, number + 1)})


def attend_to_cache(
    attend: Callable[..., tuple[Array, Any, Array | None]],
    q: Float[Array, "b t n h"],
    cache: KVCache,
    layer: Int32[Array, ""],
    patterns: LayerPatterns | None,
    *,
    start: Int32[Array, ""],
    lengths: Int32[Array, " b"],
) -> tuple[Float[Array, "b own n h"], Any, Float[Array, " b"] | None]:
    """`attend(q, k, v, patterns, lengths=…, q_offset=start)` to one layer of the cache, which holds the part itself.

    `lengths`: of the whole sequences. Of `attend`'s information the arrays are those of the prefix that was read, all
    else is what it says of the whole cache.
    """
    end = start + q.shape[1]
    seen, q = jnp.minimum(lengths, end), cache.queries(q)
    if patterns is not None:
        patterns = patterns.for_part(seen, lengths)

    def whole_or_prefix(extent: int) -> tuple[Array, Any, Array | None]:
        k, v = cache.read(layer, q.dtype, extent)
        return attend(q, k, v, patterns, lengths=jnp.minimum(seen, extent), q_offset=start)

    extents = prefix_extents(q.shape[1], cache.capacity)
    if len(extents) == 1:
        return whole_or_prefix(extents[0])
    which = sum(((end > extent).astype(jnp.int32) for extent in extents[:-1]), jnp.int32(0))
    structure = jax.tree.structure(jax.eval_shape(partial(whole_or_prefix, extents[-1])))
    # What is said of each prefix differs in words, and a switch wants branches of one structure.
    branches = [lambda extent=extent: jax.tree.leaves(whole_or_prefix(extent)) for extent in extents]
    return jax.tree.unflatten(structure, jax.lax.switch(which, branches))
