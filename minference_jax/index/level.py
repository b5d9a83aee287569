"""One level for all tiles of a layer: tiles whose key is above it are visited, and they fit into a number of cells.

The level is the lowest for which that holds. Tiles whose key equals the level are visited in order of position while
they fit: so of many equal tiles (a prompt that repeats one token) some are visited, neither all nor none.

A *key* is a tile's worth as a 15-bit integer. Query tiles × key tiles is the largest array of an index; it is kept in
16 bits and read few times.

Two forms give the same result. In jnp, five passes find three bits of the level each, by seven sums, and bitmaps become
lists. On Hopper, two passes count the tiles of each digit, and lists are written at once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16

from minference_jax.index import select
from pallas_kernels.index.keys import digit_counts, key_lists
from pallas_kernels.index.running import best_digit, tied_tiles
from pallas_kernels.index.tile_keys import ALWAYS, NEVER
from pallas_kernels.sizes import KEY_TILE

_BITS, _DIGIT = 15, 3  # of a key, and of the level that a pass finds in jnp
_LOW = 7  # bits of the level that the second of two passes finds


def reaching(
    keys: UInt16[Array, "b n i j"],
    open_keys: Int[Array, "b n j"] | None,
    rows: Int[Array, "b i"],
    most: Float[Array, " b"],
    *,
    axis_name: str | None = None,
    kernels: bool = False,
) -> tuple[Int[Array, "b n i j"], Int[Array, "b n i"]]:
    """The tiles with the highest keys: as many as have at most `most` cells together, in each sequence.

    Tiles of key ALWAYS are taken whatever they cost; tiles of key NEVER are not taken. Of equal keys, the tile with the
    lower (head, query tile, key tile) comes first.

    **Arguments:** `open_keys`: how many keys of a tile each head counts, None for all 64; `rows`: rows that each query
    tile counts: a tile has open_keys · rows cells. `axis_name` (static): a mesh axis over which the heads of a layer
    are divided, inside `jax.shard_map`: their cells are added up. `kernels` (static): on Hopper.

    **Returns:** tiles of each query tile, ascending, whatever it may be from the count on, and the counts.
    """

    unit = KEY_TILE if open_keys is None else 1  # cells of what is counted
    find = _level_by_counts if kernels else _level_by_sums
    level = find(keys, open_keys, rows, most / unit, axis_name)
    # Above the level everything fits, or else only what is always taken is left; at the level, as long as it fits.
    above, reached = jnp.moveaxis(_reached(keys, open_keys, [level + 1, jnp.maximum(level, 1)]), -1, 0)
    if axis_name is not None:
        most = _without_others(above, reached, unit * rows, most, axis_name)
    ties = (tied_tiles if kernels else _tied_tiles)(above, reached, rows, most, unit=unit, width=keys.shape[-1])
    return (key_lists if kernels else _lists)(keys, level, ties)


def _without_others(above, reached, height, most, axis_name) -> Float[Array, " b"]:
    """The cells that other devices leave: all theirs above the level go first, and earlier heads' ties."""
    counts = jnp.stack([above, reached - above]).astype(jnp.float32)
    own = (counts * height[:, None].astype(jnp.float32)).sum((2, 3))  # [2, b]
    every, here = jax.lax.all_gather(own, axis_name), jax.lax.axis_index(axis_name)
    device = jnp.arange(every.shape[0])[:, None]
    taken = jnp.where(device != here, every[:, 0], 0) + jnp.where(device < here, every[:, 1], 0)
    return most - taken.sum(0)


def _tied_tiles(above, reached, rows, most, *, unit, width) -> Int[Array, "b n i"]:
    """`tied_tiles` in jnp."""
    height = unit * rows[:, None].astype(jnp.float32)
    tied = (reached - above).astype(jnp.float32) * height
    left = (most - (above.astype(jnp.float32) * height).sum((1, 2)))[:, None, None]
    left = left - (jnp.cumsum(tied.reshape(tied.shape[0], -1), axis=-1).reshape(tied.shape) - tied)
    fitting = jnp.floor(left / jnp.maximum(KEY_TILE * rows, 1)[:, None].astype(jnp.float32))
    return jnp.where(tied <= left, width, jnp.clip(fitting, 0, width)).astype(jnp.int32)


def _reached(
    keys: UInt16[Array, "b n i j"], open_keys: Int[Array, "b n j"] | None, levels: list[Int[Array, " b"]]
) -> Int[Array, "b n i d"]:
    """Keys of each query tile's tiles that reach each of some levels; tiles, where every one has all keys."""
    share = 1 if open_keys is None else open_keys[:, :, None]
    counts = (
        jnp.sum(jnp.where(keys.astype(jnp.int32) >= level[:, None, None, None], share, 0), -1, dtype=jnp.int32)
        for level in levels
    )
    return jnp.stack(list(counts), -1)


def _level_by_sums(keys, open_keys, rows, most, axis_name) -> Int[Array, " b"]:
    """The highest level whose tiles, those at it included, have more than `most` cells; 0 if there is none, at most
    ALWAYS - 1.

    Each pass finds three bits: it sums the cells that reach each of seven trial levels.
    """

    def further(found: Array, shift: Any) -> Array:
        trials = _reached(keys, open_keys, [found + (jnp.int32(digit) << shift) for digit in range(1, 1 << _DIGIT)])
        cells = (trials.astype(jnp.float32) * rows[:, None, :, None].astype(jnp.float32)).sum((1, 2))
        cells = cells if axis_name is None else jax.lax.psum(cells, axis_name)
        return found + ((cells > most[:, None]).sum(-1, dtype=jnp.int32) << shift)

    # The first pass by itself: over a mesh, what the loop carries must vary from the start as it does afterwards.
    top = _BITS - _DIGIT
    found = further(jnp.zeros(most.shape, jnp.int32), top)
    found = jax.lax.fori_loop(1, _BITS // _DIGIT, lambda turn, found: further(found, top - _DIGIT * turn), found)
    return jnp.minimum(found, ALWAYS - 1)


def _level_by_counts(keys, open_keys, rows, most, axis_name) -> Int[Array, " b"]:
    """What `_level_by_sums` finds, in two passes: tiles are counted by the high, then by the low bits of their keys."""

    def best(prefix, above, *, shift, bits, highest=None):
        counts = digit_counts(keys, rows, open_keys, prefix, shift=shift, bits=bits)
        if axis_name is not None:
            counts = jax.lax.psum(counts.astype(jnp.float32).sum(1, keepdims=True), axis_name)
        return best_digit(counts, most, above, prefix, highest=highest)

    high, beyond = best(None, jnp.zeros(most.shape, jnp.float32), shift=_LOW, bits=_BITS - _LOW)
    level, _ = best(high, beyond, shift=0, bits=_LOW, highest=ALWAYS - 1)
    return level


def _lists(keys, level, ties) -> tuple[Int[Array, "b n i j"], Int[Array, "b n i"]]:
    """`key_lists` in jnp."""
    level, wide = level[:, None, None, None], keys.astype(jnp.int32)
    above, tied = select.pack(wide > level), select.pack((wide == level) & (wide != NEVER))
    count = jax.lax.population_count(tied).astype(jnp.int32)
    before = jnp.cumsum(count, axis=-1) - count
    words = above | select.lowest_bits(tied, jnp.maximum(ties[..., None] - before, 0))
    return select.word_positions(words, keys.shape[-1], 0)
