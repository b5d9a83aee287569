"""Band tiles: 64 keys at a fixed distance before each tile of 128 queries; what a kernel visits, so what costs."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.plan import KEY_TILE, QUERY_TILE


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


def tile_budget(slashes: int, *, window_share: float = 1 / 3, cluster: int = 127) -> int:
    """Tiles that cost about as much as `slashes` lines do, for `VerticalSlash(columns, tiles=...)`.

    What lines cost depends on how they cluster. The model here: `window_share` of them form a window next to the
    diagonal, the others lie in clusters of `cluster` neighbours; a run of c lines takes (c + 127) / 64 tiles,
    rounded up. `cluster=1` gives the cost of lines that all lie apart.

    Raises ValueError for a negative number of slashes, a share outside [0, 1] or a cluster below 1.
    """
    if slashes < 0 or not 0 <= window_share <= 1 or cluster < 1:
        raise ValueError(f"tile_budget: got slashes={slashes}, window_share={window_share}, cluster={cluster}")
    window = round(slashes * window_share)
    per_cluster = -(-(cluster + QUERY_TILE - 1) // KEY_TILE)
    return max(1, math.ceil(window / KEY_TILE) + round((slashes - window) / cluster * per_cluster))
