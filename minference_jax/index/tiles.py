"""Band tiles: 64 keys at a fixed distance before each tile of 128 queries; what a kernel visits, so what costs."""

from __future__ import annotations

import functools
import math
import operator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.plan import KEY_TILE, QUERY_TILE

GROUP = 16
"""Keys whose mass is summed before it is binned by distance; a quarter of a tile blurs the scores little, and leaves
sixteen times less to shift."""


def captured_share(distance: int) -> float:
    """Share of a query tile's rows for which a key `distance` further back than the band lies in the band's tile.

    For the band at distance r, row o of the tile sees keys at distances (r + o − 64, r + o] in it. Over the 128 rows
    that is a trapezoid in (key distance − r): up from −63, flat at one half, down to 127.
    """
    return max(0, min(QUERY_TILE - 1, distance + KEY_TILE - 1) - max(0, distance) + 1) / QUERY_TILE


def band_scores(
    weights: Float[Array, "*heads p s"], positions: Int[Array, "*heads p"], *, skip: int = 0
) -> Float[Array, "*heads r"]:
    """Probe mass that each band (distance 64·r, r = 0 … ⌈s/64⌉) would capture, over all rows of a query tile.

    Each probe's mass is taken at its distance and weighted by `captured_share`, so that it does not matter where in
    its query tile a probe lies. Keys before `skip` (a multiple of 16) are left out: the sink belongs to the columns,
    and at the probes' distances it would pass for a band.
    """
    s, per_tile = weights.shape[-1], KEY_TILE // GROUP
    weights = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -s % KEY_TILE)])
    groups = weights.reshape(*weights.shape[:-1], -1, GROUP).sum(-1)
    count = groups.shape[-1]
    distance = jnp.arange(count, dtype=jnp.int32)
    key_group = (positions // GROUP)[..., None] - distance
    binned = jnp.take_along_axis(groups, jnp.clip(key_group, 0, count - 1), axis=-1, mode="clip")
    binned = jnp.where((key_group >= skip // GROUP) & (positions[..., None] >= 0), binned, 0).sum(-2)
    # Taps at the group distances that a band's trapezoid reaches, relative to the band's own.
    first = -(KEY_TILE // GROUP - 1)
    taps = np.array([captured_share(GROUP * i) for i in range(first, QUERY_TILE // GROUP)], np.float32)
    bands = count // per_tile + 1
    padded = jnp.pad(binned, [(0, 0)] * (binned.ndim - 1) + [(-first, per_tile + len(taps))])
    terms = (taps[i] * padded[..., i : i + per_tile * bands : per_tile] for i in range(len(taps)))
    return functools.reduce(operator.add, terms)


def bands_of_lines(lines: Bool[Array, "*heads s"]) -> Bool[Array, "*heads r"]:
    """Bands (distance 64·r, r = 0 … ⌈s/64⌉) that any of the flagged slash distances runs through.

    A line at distance d crosses the bands r with d in [r − 63, r + 127]: see `captured_share`.
    """
    s = lines.shape[-1]
    lines = jnp.pad(lines, [(0, 0)] * (lines.ndim - 1) + [(0, -s % KEY_TILE)])
    blocks = lines.reshape(*lines.shape[:-1], -1, KEY_TILE)
    here, but_first = blocks.any(-1), blocks[..., 1:].any(-1)
    none = jnp.zeros((*here.shape[:-1], 1), bool)
    here = jnp.concatenate([here, none], -1)
    further = jnp.concatenate([here[..., 1:], none], -1)
    nearer = jnp.concatenate([none, but_first], -1)
    return here | further | nearer


def tile_budget(slashes: int, *, window_share: float = 1 / 3, cluster: int = 127) -> int:
    """Tiles that cost about as much as `slashes` lines do, for `VerticalSlash(columns, tiles=...)`.

    What lines cost depends on how they cluster. The model here: `window_share` of them form a window next to the
    diagonal, the others lie in clusters of `cluster` neighbours; a run of c lines crosses (c + 190) / 64 bands.
    `cluster=1` gives the cost of lines that all lie apart.

    Raises ValueError for a negative number of slashes, a share outside [0, 1] or a cluster below 1.
    """
    if slashes < 0 or not 0 <= window_share <= 1 or cluster < 1:
        raise ValueError(f"tile_budget: got slashes={slashes}, window_share={window_share}, cluster={cluster}")
    window = round(slashes * window_share)
    overhang = QUERY_TILE + KEY_TILE - 2
    clusters = (slashes - window) / cluster
    return max(1, math.ceil(window / KEY_TILE) + round(clusters * (cluster + overhang) / KEY_TILE))
