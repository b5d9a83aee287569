"""Band tiles: 64 keys at one distance before every query tile. Which entries of a list count, and what they cover.

The band at distance r shows, to the query tile that starts at q0, the keys [q0 - r, q0 - r + 64). A key that lies
`distance` before q0 is in it if r - 64 < distance <= r, wherever the query tile is: one list serves all query tiles.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

from pallas_kernels.sizes import KEY_TILE, num_key_tiles

SHORT = 1_024
"""Lists up to this width are searched by comparing all pairs: more operations, but a single fused kernel on a GPU."""

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
    bands: Int[Array, "z R"], count: Int[Array, " z"], block_count: Int[Array, "z i"] | None, *, multiple: int
) -> Int[Array, "z R"]:
    """The distances that count, ascending without gaps; the rest of each list holds `NO_BAND`."""
    keep = kept_bands(bands, count, block_count, multiple=multiple)
    order = running_count(keep)
    nth = jnp.broadcast_to(jnp.arange(1, bands.shape[-1] + 1, dtype=jnp.int32), bands.shape)
    listed = jnp.take_along_axis(bands, entries_before(order, nth), axis=-1, mode="clip")
    return jnp.where(nth <= order[:, -1:], listed, NO_BAND)


def band_bitmap(bands: Int[Array, "z R"], size: int) -> UInt32[Array, "z w"]:
    """The distances that `listed_bands` cover, a bit each: bit d % 32 of word d // 32, for distances below `size`."""
    tiles = num_key_tiles(size)
    # Bands are at least 64 apart, so each 64 distances hold at most one. 1 + its place there, or 0.
    if bands.shape[-1] * tiles <= SHORT**2 // 2:  # all pairs, in a kernel less
        place = jnp.arange(tiles + 1, dtype=jnp.int32)
        here = bands[:, None, :] // KEY_TILE == place[:, None]
        inside = jnp.where(here, 1 + bands[:, None, :] % KEY_TILE, 0).max(-1, initial=0)
    else:
        # Integers and a maximum: an atomic on int32 needs no compare-and-swap loop.
        head = jnp.arange(bands.shape[0], dtype=jnp.int32)[:, None]
        inside = jnp.zeros((bands.shape[0], tiles + 1), jnp.int32)
        inside = inside.at[head, bands // KEY_TILE].max(1 + bands % KEY_TILE, mode="drop")
    # A band covers the 64 distances up to its own: of these 64 those up to the band in them, and, if the next 64 hold
    # a band, those past its place.
    here, after = inside[:, :-1, None], inside[:, 1:, None]
    offset = jnp.arange(0, KEY_TILE, 32, dtype=jnp.int32)
    words = _low_bits(here - offset) | jnp.where(after > 0, ~_low_bits(after - offset), jnp.uint32(0))
    return words.reshape(bands.shape[0], -1)


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
    """How many entries of each ascending list are less than each limit."""
    method = "compare_all" if ascending.shape[-1] <= SHORT else "scan_unrolled"
    return jax.vmap(partial(jnp.searchsorted, method=method))(ascending, limits).astype(jnp.int32)


def running_max(values: Int[Array, "*z w"]) -> Int[Array, "*z w"]:
    """Largest of each entry and those before it, for integers of at least -1."""
    if values.shape[-1] > SHORT:
        return lax.cummax(values, axis=values.ndim - 1)
    return jnp.where(_up_to(values.shape[-1]), values[..., None, :], -1).max(-1)


def running_count(flags: Bool[Array, "*z w"]) -> Int[Array, "*z w"]:
    """Number of set flags up to each entry, itself included."""
    if flags.shape[-1] > SHORT:
        return jnp.cumsum(flags, axis=-1, dtype=jnp.int32)
    return (_up_to(flags.shape[-1]) & flags[..., None, :]).sum(-1, dtype=jnp.int32)


def _up_to(width: int) -> Bool[Array, "w w"]:
    place = jnp.arange(width, dtype=jnp.int32)
    return place <= place[:, None]
