"""One level for all tiles of a layer: the lowest at which those that reach it fit into a number of cells.

X Tiles at the level itself are taken in
order of position while they fit, so that equal worths (a prompt of one token) neither all fit nor all fall out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16, UInt32

from minference_jax.index import select
from pallas_kernels.plan import KEY_TILE

NEVER, ALWAYS = 0, 0x7FFF
"""Keys of tiles that are not visited at any level, and of those that are visited at all."""

_BITS, _DIGIT = 15, 3  # of a key, and of the level that a pass finds
_SMALLEST = 2.0**-31
_STEPS = 10  # bits of a key below the octave


def level_keys(worth: Float[Array, "*tiles"]) -> UInt16[Array, "*tiles"]:
    """Worths in (0, 1] as integers in their order, 1,024 to an octave: those of 1 to ALWAYS - 1.

    Worths of 2⁻³¹ or less, zero among them, have key 1.
    """
    bits, least = (jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32) for x in (worth, _SMALLEST))
    return jnp.clip(((bits - least) >> (23 - _STEPS)) + 1, 1, ALWAYS - 1).astype(jnp.uint16)


def reaching_words(
    keys: UInt16[Array, "b n i j"],
    open_keys: Int[Array, "b n j"] | None,
    rows: Float[Array, "b i"],
    most: Float[Array, " b"],
    axis_name: str | None = None,
) -> UInt32[Array, "b n i w"]:
    """The tiles of the highest keys that have no more than `most` cells in a sequence, as bitmaps over j.

    Tiles of key ALWAYS are taken whatever they cost, those of key NEVER are not. Equal keys go to the lower (head,
    query tile, key tile).

    **Arguments:** `open_keys`: how many keys of a tile each head counts, None for all 64; `rows`: rows that each query
    tile counts: a tile has open_keys · rows cells. `axis_name` (static): a mesh axis over which the heads of a layer
    are divided, inside `jax.shard_map`: their cells are added up.
    """
    b = keys.shape[0]

    def reached(trials: list[Int[Array, " b"]]) -> Int[Array, "b n i d"]:
        """Keys of each query tile's tiles that reach each of some levels."""
        share = 1 if open_keys is None else open_keys[:, :, None]
        counts = (
            jnp.sum(jnp.where(keys.astype(jnp.int32) >= level[:, None, None, None], share, 0), -1, dtype=jnp.int32)
            for level in trials
        )
        return jnp.stack(list(counts), -1) * (KEY_TILE if open_keys is None else 1)

    def total(cells: Float[Array, "b n i *d"]) -> Float[Array, b * d]:
        cells = cells.sum((1, 2))
        return cells if axis_name is None else jax.lax.psum(cells, axis_name)

    rows = rows[:, None]
    found = jnp.zeros((b,), jnp.int32)  # the highest level that is reached by too many, digit by digit
    count, cells = jnp.zeros((), jnp.int32), jnp.zeros(())
    for shift in range(_BITS - _DIGIT, -1, -_DIGIT):
        last = shift == 0
        # The last pass also counts the two levels around the one that it finds.
        digits = range(0 if last else 1, (1 << _DIGIT) + last)
        count = reached([found + (digit << shift) for digit in digits])
        cells = count.astype(jnp.float32) * rows[..., None]
        over = (total(cells) > most[:, None])[:, 1:-1] if last else total(cells) > most[:, None]
        found = found + (over.sum(-1, dtype=jnp.int32) << shift)

    # Above the level everything fits, or else only what is always taken is left; at the level, as long as it fits.
    level = jnp.minimum(found, ALWAYS - 1)
    digit = (level & ((1 << _DIGIT) - 1))[:, None, None, None]
    place = jnp.arange(cells.shape[-1], dtype=jnp.int32)
    above = jnp.where(place == digit + 1, cells, 0).sum(-1)
    tied = jnp.where(place == digit, cells, 0).sum(-1) - above
    before = (jnp.cumsum(tied.reshape(b, -1), axis=-1).reshape(tied.shape)) - tied
    left = (most - total(above))[:, None, None] - before
    if axis_name is not None:
        others = jax.lax.all_gather(tied.sum((1, 2)), axis_name)
        earlier = jnp.arange(others.shape[0])[:, None] < jax.lax.axis_index(axis_name)
        left = left - jnp.where(earlier, others, 0).sum(0)[:, None, None]
    fitting = jnp.clip(jnp.floor(left / jnp.maximum(KEY_TILE * rows, 1)), 0, keys.shape[-1])
    fitting = jnp.where(tied <= left, keys.shape[-1], fitting).astype(jnp.int32)

    level = level[:, None, None, None]
    wide = keys.astype(jnp.int32)
    above_words, tied_words = select.pack(wide > level), select.pack((wide == level) & (wide != NEVER))
    ties = jax.lax.population_count(tied_words).astype(jnp.int32)
    ties_before = jnp.cumsum(ties, axis=-1) - ties
    return above_words | select.lowest_bits(tied_words, jnp.maximum(fitting[..., None] - ties_before, 0))
