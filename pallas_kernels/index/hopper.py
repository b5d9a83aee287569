"""Tile masses on Hopper GPUs: probe rows packed for one kernel, whose logarithms another normalises and adds up.

The first reads queries and keys once and leaves one number for each probe row and key tile, and a few for each row.
Rows of one KV head are ordered [query tile, head of the group, probe], so that a thread block's 128 rows span
consecutive query tiles, whose positions nearly agree.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.index.fp8 import in_fp8, pays_in_fp8
from pallas_kernels.index.normalise import normalised
from pallas_kernels.index.tile_keys import TileRule
from pallas_kernels.index.tile_lse import HEAD_DIMS as HEAD_DIMS
from pallas_kernels.index.tile_lse import MassConfig, tile_lse


def hopper_masses(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    rows: Int[Array, "b i p"],
    positions: Int[Array, "b i p"],
    share: Float[Array, "b i p"],
    *,
    scale: float,
    rule: TileRule | None = None,
    config: MassConfig | None = None,
    interpret: Any = None,
) -> Any:
    """`tile_masses` and the log-sum-exp of each probe; with a rule the keys of the tiles, from products in FP8
    where that pays.

    **Arguments:** `positions`: the last key that each probe sees, -1 for one that is none. `config`: static tuning.
    `interpret`: parameters of the Mosaic GPU interpreter; None compiles.
    """
    heads, kv_heads, keys = q.shape[2], k.shape[2], k.shape[1]
    positions = jnp.minimum(positions, keys - 1)
    b, query_tiles, per_tile = positions.shape
    if rule is not None and pays_in_fp8(q, k, query_tiles * per_tile):
        probes, k, factors = in_fp8(q, k, rows, positions, interpret=interpret is not None)
    else:
        probes, factors = packed(q, rows, kv_heads), None
    positions = jnp.broadcast_to(positions[:, :, None], (b, query_tiles, heads // kv_heads, per_tile)).reshape(b, -1)
    config = config or MassConfig.of(b * kv_heads, positions.shape[1], keys)
    lse = tile_lse(probes, k, positions, scale=scale, config=config, factors=factors, interpret=interpret)
    static: dict[str, Any] = {"heads": heads, "keys": keys, "chunk": config.chunk, "interpret": interpret is not None}
    found = normalised(*lse, positions, share, rule, **static)
    return found[0] if rule is not None else tuple(found)


def packed(q: Float[Array, "b t n h"], rows: Int[Array, "b i p"], kv_heads: int) -> Float[Array, "b k r h"]:
    """The probe rows in the kernel's order."""
    b, t, n, h = q.shape
    at = jnp.clip(rows, 0, t - 1)
    probes = q.at[jnp.arange(b, dtype=jnp.int32)[:, None, None], at].get(mode="promise_in_bounds")  # [b, i, p, n, h]
    probes = probes.reshape(*rows.shape, kv_heads, n // kv_heads, h).transpose(0, 3, 1, 4, 2, 5)
    return probes.reshape(b, kv_heads, -1, h)
