"""What a visit of a tile is worth, as an integer: the keys that an index chooses tiles by."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt16

from pallas_kernels.sizes import KEY_TILE

NEVER, ALWAYS = 0, 0x7FFF
"""Keys of tiles that are not visited at any level, and of those that are visited at all."""

_STEPS = 10  # bits of a key below the octave
_SMALLEST = int(np.float32(2.0**-31).view(np.int32))


class TileRule(NamedTuple):
    """By which tiles are worth a visit: those before their query tile, by the mean attention weight of their cells.

    The first key tile, and every tile of query tiles at the end, are visited always.
    """

    start: Int[Array, " i"]
    """Position of each query tile's first row."""

    rows: Int[Array, "b i"]
    """Its valid rows."""

    end: Bool[Array, "b i"]
    """Whether it sees every key."""

    threshold: Float[Array, "b n"]
    """Tiles of a lower mean weight are not visited; inf in a head that visits none at all."""

    def keys(
        self, mass: Float[Array, "b n i j"], open_keys: Int[Array, "b n j"] | None = None
    ) -> UInt16[Array, "b n i j"]:
        """The keys of tiles that hold so much attention mass.

        **Arguments:** `open_keys`: how many keys of a tile each head counts, None for all 64. A tile without any is not
        visited.
        """
        rows, end, start = (x[..., None, :, None] for x in (self.rows, self.end, self.start))
        threshold = self.threshold[..., None, None]
        counted = KEY_TILE if open_keys is None else open_keys[:, :, None]
        return tile_key(mass, jnp.arange(mass.shape[-1], dtype=jnp.int32), start, rows, end, threshold, counted)


def tile_key(
    mass: Float[Array, "*tiles"],
    tile: Int[Array, "*#tiles"],
    start: Int[Array, "*#tiles"],
    rows: Int[Array, "*#tiles"],
    end: Bool[Array, "*#tiles"],
    threshold: Float[Array, "*#tiles"],
    open_keys: int | Int[Array, "*#tiles"] = KEY_TILE,
) -> UInt16[Array, "*tiles"]:
    """`TileRule.keys` of single tiles: the number of each among the key tiles, and the rule's fields."""
    weight = mass / jnp.maximum(open_keys * rows, 1).astype(jnp.float32)
    eligible = (KEY_TILE * tile < start) & (open_keys * rows > 0) & (threshold < jnp.inf)
    key = jnp.where(eligible & (weight >= threshold), level_keys(weight), NEVER)
    return jnp.where(eligible & ((tile == 0) | end), ALWAYS, key).astype(jnp.uint16)


def level_keys(worth: Float[Array, "*tiles"]) -> Int[Array, "*tiles"]:
    """Worths in (0, 1] as integers in their order, 1,024 to an octave: those of 1 to ALWAYS - 1.

    Worths of 2⁻³¹ or less, zero among them, have key 1.
    """
    bits = jax.lax.bitcast_convert_type(worth, jnp.int32)
    return jnp.clip(((bits - _SMALLEST) >> (23 - _STEPS)) + 1, 1, ALWAYS - 1)
