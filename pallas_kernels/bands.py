"""Band tiles: 64 keys at one distance before every query tile. Which entries of a list count, and what they cover.

The band at distance r shows the keys [q0 - r, q0 - r + 64) to the query tile that starts at q0. So a key is in the band
if it lies `distance` before q0 with r - 64 < distance <= r, wherever the query tile is: one list serves them all.
The bands 64 and 192, each letter a key tile (`d` the diagonal, which is always visited):

    keys         0   64  128 192 256 320
    q0 = 0       d   d
    q0 = 128     .   b   d   d               b = [64, 128) by the band 64; the band 192 would begin before key 0
    q0 = 256     .   b   .   b   d   d       b = [64, 128) by the band 192, [192, 256) by the band 64
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

from pallas_kernels.sizes import KEY_TILE, num_key_tiles

SHORT = 1_024
"""Lists up to this width are searched by comparing all pairs: more operations, but a single fused kernel on a GPU."""

MANY = 1 << 26
"""More pairs than this are not compared, however short the lists are."""

FEW = 1 << 23
"""So many pairs of an entry and a limit are compared at once."""

NO_BAND = jnp.iinfo(jnp.int32).max
"""Fills the end of a list of bands: sorts after every distance."""


def kept_bands(
    bands: Int[Array, "*z R"], count: Int[Array, "*z"], block_count: Int[Array, "*z i"] | None, *, multiple: int
) -> Bool[Array, "*z R"]:
    """Which entries of a plan's bands count, by the rules of `SparsePlan`: they name disjoint tiles.

    **Arguments:** the fields of the plan; `block_count` is that of the same heads, or None without blocks; `multiple`:
    the plan's `band_multiple`.
    """
    valid = (
        (jnp.arange(bands.shape[-1], dtype=jnp.int32) < count[..., None])
        & (bands >= KEY_TILE)
        & (bands % multiple == 0)
    )
    if block_count is not None:
        valid &= (bands % KEY_TILE == 0) | (block_count.max(-1, initial=0) == 0)[..., None]
    distance = jnp.where(valid, bands, 0)
    before = jnp.pad(running_max(distance)[..., :-1], [(0, 0)] * (bands.ndim - 1) + [(1, 0)])
    return distance - before >= KEY_TILE


def listed_bands(
    bands: Int[Array, "z R"],
    count: Int[Array, " z"],
    block_count: Int[Array, "z i"] | None,
    *,
    multiple: int,
    clean: bool,
) -> Int[Array, "z R"]:
    """The distances that count, ascending without gaps; the rest of each list holds `NO_BAND`.

    **Arguments:** as `kept_bands`, and `clean`: the plan's promise that all of them count.
    """
    if clean:
        return jnp.where(jnp.arange(bands.shape[-1], dtype=jnp.int32) < count[:, None], bands, NO_BAND)
    keep = kept_bands(bands, count, block_count, multiple=multiple)
    order = running_count(keep)
    nth = jnp.broadcast_to(jnp.arange(1, bands.shape[-1] + 1, dtype=jnp.int32), bands.shape)
    listed = jnp.take_along_axis(bands, entries_before(order, nth), axis=-1, mode="clip")
    return jnp.where(nth <= order[:, -1:], listed, NO_BAND)


def band_bitmap(bands: Int[Array, "z R"], size: int) -> UInt32[Array, "z w"]:
    """The distances that `listed_bands` cover, a bit each: bit d % 32 of word d // 32, for distances below `size`."""
    first = 32 * jnp.arange(2 * num_key_tiles(size), dtype=jnp.int32)  # the distance of each word's lowest bit
    # Bands are 64 wide and at least 64 apart: only the first two that end at or past a word can reach into it.
    place = entries_before(bands, jnp.broadcast_to(first, (bands.shape[0], first.size)))
    words = jnp.uint32(0)
    for nth in (place, place + 1):
        past = jnp.minimum(at_place(bands, nth) - first, 4 * KEY_TILE)  # distances past the first, within the band
        words |= _low_bits(past + 1) & ~_low_bits(past + 1 - KEY_TILE)
    return words


def _low_bits(count: Int[Array, "*z"]) -> UInt32[Array, "*z"]:
    """Words with the lowest `count` bits set: none if it is negative, all from 32 on."""
    inside = jnp.clip(count, 0, 31).astype(jnp.uint32)
    return jnp.where(count >= 32, jnp.uint32(0xFFFFFFFF), (jnp.uint32(1) << inside) - jnp.uint32(1))


def covered(bitmap: UInt32[Array, "z w"], distance: Int[Array, "z *lead m"]) -> Bool[Array, "z *lead m"]:
    """Whether a key at `distance` before a query tile's first row lies in a band tile; False out of the bitmap."""
    word = distance >> 5
    inside = (word >= 0) & (word < bitmap.shape[-1])
    head = jnp.arange(bitmap.shape[0], dtype=jnp.int32).reshape(-1, *[1] * (distance.ndim - 1))
    words = bitmap.at[head, jnp.clip(word, 0, bitmap.shape[-1] - 1)].get(mode="promise_in_bounds")
    return inside & ((words >> (distance & 31).astype(jnp.uint32)) & jnp.uint32(1) == jnp.uint32(1))


def entries_before(ascending: Int[Array, "z w"], limits: Int[Array, "z m"]) -> Int[Array, "z m"]:
    """How many entries of each ascending list are less than each limit.

    Compares all pairs where they are few, else first whole rows of the list and then the entries of one row: a GPU
    kernel each, where every step of a binary search would be one.
    """
    width = ascending.shape[-1]
    if limits.size * width <= FEW:
        return (ascending[:, None, :] < limits[..., None]).sum(-1, dtype=jnp.int32)
    size = 1 << (width.bit_length() // 2)
    rows = jnp.pad(ascending, ((0, 0), (0, -width % size)), constant_values=NO_BAND)
    rows = rows.reshape(rows.shape[0], -1, size)
    whole = (rows[:, None, :, -1] < limits[..., None]).sum(-1, dtype=jnp.int32)
    whole = jnp.minimum(whole, rows.shape[1] - 1)
    head = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None]
    rest = rows.at[head, whole].get(mode="promise_in_bounds") < limits[..., None]
    return size * whole + rest.sum(-1, dtype=jnp.int32)


def at_place(lists: Int[Array, "z w"], place: Int[Array, "z m"]) -> Int[Array, "z m"]:
    """lists[z, place] of each list, `NO_BAND` past its end."""
    head = jnp.arange(lists.shape[0], dtype=jnp.int32)[:, None]
    inside = jnp.clip(place, 0, lists.shape[-1] - 1)
    return jnp.where(place < lists.shape[-1], lists.at[head, inside].get(mode="promise_in_bounds"), NO_BAND)


def running_max(values: Int[Array, "*z w"]) -> Int[Array, "*z w"]:
    """Largest of each entry and those before it, for integers of at least -1."""
    if values.shape[-1] > SHORT or values.size * values.shape[-1] > MANY:
        return lax.cummax(values, axis=values.ndim - 1)
    return jnp.where(_up_to(values.shape[-1]), values[..., None, :], -1).max(-1, initial=-1)


def running_count(flags: Bool[Array, "*z w"]) -> Int[Array, "*z w"]:
    """Number of set flags up to each entry, itself included."""
    if flags.shape[-1] > SHORT:
        return jnp.cumsum(flags, axis=-1, dtype=jnp.int32)
    return (_up_to(flags.shape[-1]) & flags[..., None, :]).sum(-1, dtype=jnp.int32)


def _up_to(width: int) -> Bool[Array, "w w"]:
    place = jnp.arange(width, dtype=jnp.int32)
    return place <= place[:, None]
