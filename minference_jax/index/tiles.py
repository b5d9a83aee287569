"""Band tiles: 64 keys at a fixed distance before each tile of 128 queries; what a kernel visits, so what costs."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.plan import KEY_TILE, QUERY_TILE, num_key_tiles

WINDOW_LINES = 100
"""Of the lines that the original takes, so many form a window next to the diagonal."""


def band_scores(distances: Float[Array, "*heads s"]) -> Float[Array, "*heads r"]:
    """Mass that each band (distance 64·r, r = 0 … ⌈s/64⌉) captures over all rows of a query tile, given the mass at
    each distance between a query and a key.

    Row o of the tile sees the band's keys at distances (64·r + o − 64, 64·r + o]: over the 128 rows, a share of each
    distance that rises over the 64 before 64·r, is one half over the next 64, and falls over the 64 after those. (So
    it does not matter where in its query tile a probe lies.)
    """
    around = (KEY_TILE, -distances.shape[-1] % KEY_TILE + 2 * KEY_TILE)
    blocks = jnp.pad(distances, [(0, 0)] * (distances.ndim - 1) + [around])
    blocks = blocks.reshape(*blocks.shape[:-1], -1, KEY_TILE)
    offset = jnp.arange(KEY_TILE, dtype=jnp.float32)
    total, rising = blocks.sum(-1), (blocks * offset).sum(-1)
    falling = KEY_TILE * total - rising
    return (rising[..., :-2] + KEY_TILE * total[..., 1:-1] + falling[..., 2:]) / QUERY_TILE


def tile_budget(slashes: int, tokens: int | None = None) -> int:
    """Tiles that about as many slash lines as these take, for `VerticalSlash(columns, tiles=...)`.

    What lines cost depends on how they cluster. On text, the original's choice beyond its window of 100 takes about
    0.7 · lines^0.63 tiles, the more lines the fewer each; a prompt of `tokens`, if given, has no more than it has
    key tiles. Fitted on 270 heads of SmolLM2-135M over the starts of Persuasion and Hamlet, 4,096 and 8,192 tokens:

    | lines | tiles, mean over heads | 10th to 90th percentile | this formula |
    |---|---|---|---|
    | 128 | 7 | 5 to 12 | 8 |
    | 512 | 34 to 37 | 22 to 52 | 33 |
    | 2,048 (8,192 tokens) | 81 | 56 to 111 | 85 |

    Raises ValueError for a negative number of slashes or tokens.
    """
    if slashes < 0 or (tokens is not None and tokens < 0):
        raise ValueError(f"tile_budget: got slashes={slashes}, tokens={tokens}")
    window = min(slashes, WINDOW_LINES)
    tiles = max(1, math.ceil(window / KEY_TILE) + round(0.7 * (slashes - window) ** 0.63))
    return tiles if tokens is None else max(1, min(tiles, num_key_tiles(tokens)))
