"""Tile masses in plain jnp: the oracle of the kernel, and the form for every device that it does not serve."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.index.tile_keys import TileRule
from pallas_kernels.sizes import KEY_TILE, num_key_tiles

SCORES = 1 << 25
"""Most scores that are stored at once, as long as the probes of one query tile have no more."""


def xla_masses(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    rows: Int[Array, "b i p"],
    positions: Int[Array, "b i p"],
    share: Float[Array, "b i p"],
    *,
    scale: float,
    rule: TileRule | None = None,
) -> Any:
    """`tile_masses` and the log-sum-exp of each probe, some query tiles at a time; with a rule the keys of the tiles.

    **Arguments:** `positions`: the last key that each probe sees, -1 for one that is none.
    """
    b, t, n, h = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    per_tile = rows.shape[2]
    exact = lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
    batch = jnp.arange(b, dtype=jnp.int32)[:, None]

    def one(tile: tuple[Array, Array, Array]) -> tuple[Float[Array, "b n j"], Float[Array, "b n p"]]:
        row, position, weight = tile  # [b, p]
        probes = q.at[batch, jnp.clip(row, 0, t - 1)].get(mode="promise_in_bounds")
        probes = probes.reshape(b, per_tile, kv_heads, n // kv_heads, h)
        scores = jnp.einsum("bpkgh,bskh->bkgps", probes, k, precision=exact, preferred_element_type=jnp.float32)
        seen = jnp.arange(s, dtype=jnp.int32) <= position[:, None, None, :, None]
        scores = jnp.where(seen, scores * jnp.float32(scale), -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        of_row = weight[:, None, None, :, None] * jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0)[..., None])
        of_key = jnp.pad(of_row.sum(-2), ((0, 0), (0, 0), (0, 0), (0, -s % KEY_TILE)))
        mass = of_key.reshape(b, n, num_key_tiles(s), KEY_TILE).sum(-1)
        return mass, lse.reshape(b, n, per_tile)

    at_once = max(1, min(rows.shape[1], SCORES // (b * n * per_tile * s)))
    mass, lse = lax.map(one, tuple(x.swapaxes(0, 1) for x in (rows, positions, share)), batch_size=at_once)
    mass, lse = jnp.moveaxis(mass, 0, 2), jnp.moveaxis(lse, 0, 2)
    return (mass, lse) if rule is None else rule.keys(mass)
