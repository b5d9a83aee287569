"""The rule of `SparsePlan`, written once: which entries of a plan's lists count, and what a query tile sees by them.

Let q0 be the position of a query tile's first row. The tile sees whole (all of its rows see all of the keys)

- band r: the keys [q0 − r, q0 − r + 64), of which those before key 0 do not exist;
- block j: the keys [64 j, 64 j + 64), if that lies before q0;
- column c: the key c, if it lies before q0.

A key that several of them name is seen once: by its band; else by its block; else as a column. The keys from q0 on are
the diagonal's, under a causal mask. `SparsePlan.to_mask`, the blockwise jnp backend and the kernels' tables are made of
these functions; what each of them adds is only the form that it needs.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from pallas_kernels.bands import covered, running_max
from pallas_kernels.sizes import KEY_TILE


def listed(values: Int[Array, "*lead w"], count: Int[Array, "*lead"]) -> Bool[Array, "*lead w"]:
    """Which entries of each list are below its count. The others are ignored, whatever they hold."""
    return jnp.arange(values.shape[-1], dtype=jnp.int32) < count[..., None]


def rising(values: Int[Array, "*lead w"], valid: Bool[Array, "*lead w"]) -> Bool[Array, "*lead w"]:
    """Which valid entries are greater than every valid one before them: those that count, each once, in order.

    Valid entries are at least 0.
    """
    value = jnp.where(valid, values, -1)
    before = running_max(value)[..., :-1]
    return value > jnp.pad(before, [(0, 0)] * (value.ndim - 1) + [(1, 0)], constant_values=-1)


def reach(q0: Int[Array, "*#z"]) -> Int[Array, "*#z"]:
    """Bands at distances less than this hold a key at or after key 0."""
    return q0 + KEY_TILE


def band_start(bands: Int[Array, "*#z"], q0: Int[Array, "*#z"]) -> Int[Array, "*#z"]:
    """First key of a band that reaches its query tile."""
    return jnp.maximum(q0 - bands, 0)


def band_cut(bands: Int[Array, "*#z"], q0: Int[Array, "*#z"]) -> Int[Array, "*#z"]:
    """Keys of a band that lie before key 0. A copy of 64 keys from `band_start` has so many too many at its end."""
    return jnp.maximum(bands - q0, 0)


def past_blocks(
    blocks: Int[Array, "*lead M"], count: Int[Array, "*lead"], q0: Int[Array, "*q"], *, clean: bool
) -> Bool[Array, "*lead M"]:
    """Which blocks of a query tile count: in order, each once, before the diagonal. A band may hold some of them.

    **Arguments:** `q0`: broadcasts with `blocks`; `clean`: the plan's promise that they are in order, none negative.
    """
    valid = listed(blocks, count) & (blocks < q0 // KEY_TILE)
    return valid if clean else rising(blocks, valid & (blocks >= 0))


def past_in_order(
    blocks: Int[Array, "*lead M"], count: Int[Array, "*lead"], q0: Int[Array, "*#lead"]
) -> Int[Array, "*lead"]:
    """How many blocks of a clean plan count: the sum of its `past_blocks`, from two looks at each list.

    Lists are as wide as the prompt has key tiles, and to read all of them takes as long as it took to write them. The
    first look is at one block in a few, the second at those between two of them.
    """
    width = blocks.shape[-1]
    step = 1 << (width.bit_length() + 1) // 2  # about the root
    last = jnp.arange(step - 1, width, step, dtype=jnp.int32)
    found = step * _counting(blocks[..., step - 1 :: step], last, count, q0).sum(-1, dtype=jnp.int32)
    places = found[..., None] + jnp.arange(step, dtype=jnp.int32)
    near = jnp.take_along_axis(blocks, jnp.minimum(places, width - 1), -1, mode="promise_in_bounds")
    within = _counting(near, places, jnp.minimum(count, width), q0)
    return found + within.sum(-1, dtype=jnp.int32)


def _counting(blocks: Array, places: Array, count: Array, q0: Array) -> Bool[Array, "*lead m"]:
    return (places < count[..., None]) & (blocks < (q0 // KEY_TILE)[..., None])


def listed_columns(
    columns: Int[Array, "*lead C"], count: Int[Array, "*lead"], kv_len: int, *, clean: bool
) -> tuple[Int[Array, "*lead C"], Int[Array, "*lead C"]]:
    """The columns that count, with -1 in place of every other entry; and the same places as an ascending list.

    Places of the ascending list that hold less than q0 are those that the query tile at q0 has to look at.

    **Arguments:** `clean`: the plan's promise that they are in order and none is negative.
    """
    valid = listed(columns, count) & (columns < kv_len)
    kept = jnp.where(valid, jnp.maximum(columns, -1), -1)
    if clean:
        return kept, jnp.where(listed(columns, count), columns, kv_len)
    ascending = jnp.where(listed(columns, count), running_max(kept), kv_len)
    return jnp.where(rising(kept, kept >= 0), kept, -1), ascending


def seen_columns(
    columns: Int[Array, "z *lead m"], q0: Int[Array, "*q"], bitmap: UInt32[Array, "z w"] | None
) -> Bool[Array, "z *i m"]:
    """Which columns a query tile sees as such: they count, lie before it, and are in no band.

    A block may still hold some of them.

    **Arguments:** `columns`: of `listed_columns`; `q0`: broadcasts with them; `bitmap`: `bands.band_bitmap` of the
    bands that count, or None if there are none.
    """
    seen = (columns >= 0) & (columns < q0)
    return seen if bitmap is None else seen & ~covered(bitmap, q0 - columns)
