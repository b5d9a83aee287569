"""Tile masses on Hopper GPUs: probe rows packed for the kernel, and its logarithms normalised and added up.

The kernel reads queries and keys once and leaves one number for each probe row and key tile, and a few for each row.
Rows of one KV head are ordered [query tile, head of the group, probe], so that a thread block's 128 rows span
consecutive query tiles, whose positions nearly agree.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.index.tile_lse import HEAD_DIMS as HEAD_DIMS
from pallas_kernels.index.tile_lse import MassConfig, tile_lse
from pallas_kernels.sizes import KEY_TILE, num_key_tiles


def hopper_masses(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    rows: Int[Array, "b i p"],
    positions: Int[Array, "b i p"],
    share: Float[Array, "b i p"],
    *,
    scale: float,
    config: MassConfig | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "b n i j"], Float[Array, "b n i p"]]:
    """`tile_masses` and the log-sum-exp of each probe.

    **Arguments:** `positions`: the last key that each probe sees, -1 for one that is none. `config`: static tuning.
    `interpret`: parameters of the Mosaic GPU interpreter; None compiles.
    """
    heads, kv_heads, keys = q.shape[2], k.shape[2], k.shape[1]
    positions = jnp.minimum(positions, keys - 1)
    probes = packed(q, rows, kv_heads)
    of_rows = jnp.broadcast_to(positions[:, :, None], (*positions.shape[:2], heads // kv_heads, positions.shape[2]))
    config = config or MassConfig.of(positions.shape[0] * kv_heads, of_rows[0].size, keys)
    lse = tile_lse(probes, k, of_rows.reshape(positions.shape[0], -1), scale=scale, config=config, interpret=interpret)
    return normalised(*lse, positions, share, heads=heads, keys=keys, chunk=config.chunk)


def packed(q: Float[Array, "b t n h"], rows: Int[Array, "b i p"], kv_heads: int) -> Float[Array, "b k r h"]:
    """The probe rows in the kernel's order."""
    b, t, n, h = q.shape
    at = jnp.clip(rows, 0, t - 1)
    probes = q.at[jnp.arange(b, dtype=jnp.int32)[:, None, None], at].get(mode="promise_in_bounds")  # [b, i, p, n, h]
    probes = probes.reshape(*rows.shape, kv_heads, n // kv_heads, h).transpose(0, 3, 1, 4, 2, 5)
    return probes.reshape(b, kv_heads, -1, h)


def normalised(
    tiles: Float[Array, "b k R W"],
    chunks: Float[Array, "b k c R"],
    positions: Int[Array, "b i p"],
    share: Float[Array, "b i p"],
    *,
    heads: int,
    keys: int,
    chunk: int,
) -> tuple[Float[Array, "b n i j"], Float[Array, "b n i p"]]:
    """Masses and log-sum-exps from the kernel's two results, of which only what a row sees is defined.

    The larger one is read once: probes are added up as separate slices of it, which XLA fuses with their exponentials.
    """
    b, kv_heads = tiles.shape[:2]
    _, query_tiles, per_tile = positions.shape
    group = heads // kv_heads
    used = query_tiles * group * per_tile
    shape = (b, kv_heads, query_tiles, group, per_tile)
    last = positions[:, None, :, None, :]  # [b, 1, i, 1, p]

    of_chunks = chunks[..., :used].reshape(b, kv_heads, -1, *shape[2:])
    begins = chunk * jnp.arange(chunks.shape[2], dtype=jnp.int32)[:, None, None, None]
    of_chunks = jnp.where(begins <= last[:, :, None], of_chunks, -jnp.inf)
    top = jnp.maximum(of_chunks.max(2), jnp.float32(-1e38))
    total = top + jnp.log2(jnp.exp2(of_chunks - top[:, :, None]).sum(2))  # -inf for a probe that is none
    factor = jnp.where(last >= 0, share[:, None, :, None, :], 0)
    level = jnp.where(last >= 0, total, 0)

    tiles = tiles[:, :, :used].reshape(*shape, -1)
    begins = KEY_TILE * jnp.arange(tiles.shape[-1], dtype=jnp.int32)
    mass = jnp.float32(0)
    for p in range(per_tile):
        seen = begins <= last[..., p, None]
        weight = jnp.exp2(jnp.where(seen, tiles[..., p, :], -jnp.inf) - level[..., p, None])
        mass = mass + weight * factor[..., p, None]
    mass = mass[..., : num_key_tiles(keys)].swapaxes(2, 3).reshape(b, heads, query_tiles, -1)
    natural = math.log(2) * jnp.where(last >= 0, total, -jnp.inf)
    return mass, natural.swapaxes(2, 3).reshape(b, heads, query_tiles, per_tile)
