"""Which columns and blocks are worth a visit, given the attention mass on every key and in every tile.

A threshold on the mean weight decides, which is given, or found such that a layer visits a given share of its cells.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.plan import KEY_TILE

OCTAVES, STEPS = 32.0, 16
"""The threshold of a density lies within a factor of 2³² below 1, and is found to 1 / 2,048 of an octave: about what
one tile of a layer is worth at 1,024 tokens."""


class Mass(NamedTuple):
    """The estimate for some heads: attention weights summed over the rows of each query tile."""

    before: Float[Array, "b k g i kt 64"]
    """On the keys before the query tile, by key tile; zero on others."""

    diagonal: Float[Array, "b k g"]
    """On the query tiles' own keys, which are always visited."""

    rows: Float[Array, "b 1 1 i"]
    """Valid rows of each query tile."""

    start: Int[Array, " i"]
    """Position of the first row of each query tile."""

    def past(self) -> Bool[Array, "i kt"]:
        """Key tiles before each query tile."""
        return KEY_TILE * jnp.arange(self.before.shape[-2], dtype=jnp.int32) < self.start[:, None]


def worth_a_visit(
    mass: Mass, threshold: Float[Array, "b k g"]
) -> tuple[Bool[Array, "b k g x"], Bool[Array, "b k g i kt"]]:
    """The columns and blocks whose keys have at least this mean weight, where no other part visits them.

    Each of the two depends on the other: columns without blocks first, then twice blocks without the keys that are
    columns, and columns without the rows whose blocks hold them.
    """
    past = mass.past()
    level = threshold[..., None]

    def columns_beside(blocks: Bool[Array, "b k g i kt"]) -> Bool[Array, "b k g kt 64"]:
        open_tiles = past & ~blocks
        cells = jnp.sum(jnp.where(open_tiles, mass.rows[..., None], 0), axis=-2)  # [b, k, g, kt]
        found = jnp.sum(jnp.where(open_tiles[..., None], mass.before, 0), axis=-3)
        return (found >= (level * cells)[..., None]) & (cells > 0)[..., None]

    def blocks_beside(columns: Bool[Array, "b k g kt 64"]) -> Bool[Array, "b k g i kt"]:
        rest = jnp.sum(jnp.where(columns[..., None, :, :], 0, mass.before), axis=-1)
        keys = jnp.maximum(KEY_TILE - columns.sum(-1, dtype=jnp.int32), 1).astype(jnp.float32)
        cells = keys[..., None, :] * mass.rows[..., None]
        return past & (rest >= level[..., None] * cells) & (mass.rows > 0)[..., None]

    blocks = jnp.zeros(mass.before.shape[:-1], bool)
    for _ in range(2):
        blocks = blocks_beside(columns_beside(blocks))
    columns = columns_beside(blocks)
    return columns.reshape(*columns.shape[:-2], -1), blocks


def held(mass: Mass, columns: Bool[Array, "b k g x"], blocks: Bool[Array, "b k g i kt"]) -> Float[Array, "b k g"]:
    """Mass on the visited keys."""
    columns = columns.reshape(*columns.shape[:-1], 1, -1, KEY_TILE)
    return mass.diagonal + jnp.sum(jnp.where(blocks[..., None] | columns, mass.before, 0), axis=(-1, -2, -3))


def visited(mass: Mass, columns: Bool[Array, "b k g x"], blocks: Bool[Array, "b k g i kt"]) -> Float[Array, "b k g"]:
    """Cells that a plan visits: what its `density` counts."""
    columns = columns.reshape(*columns.shape[:-1], 1, -1, KEY_TILE).sum(-1, dtype=jnp.int32)
    keys = jnp.sum(jnp.where(mass.past(), jnp.where(blocks, KEY_TILE, columns), 0), axis=-1).astype(jnp.float32)
    return jnp.sum((keys + (mass.rows + 1) / 2) * mass.rows, axis=-1)


class Asked(NamedTuple):
    """What the end of a prompt looks at, visited before anything is chosen."""

    columns: Bool[Array, "b k g x"]
    blocks: Bool[Array, "b k g i kt"]


def within(
    mass: Mass, density: Float[Array, "b k g"], sink: int, asked: Asked | None = None
) -> tuple[Bool[Array, "b k g x"], Bool[Array, "b k g i kt"]]:
    """Columns (without the first `sink` keys, which are visited anyhow) and blocks at the smallest threshold at which
    the heads of a finite density visit together, in each sequence, no more than the sum of their shares.

    What is `asked` for counts as visited; the threshold decides about the rest. Where even none visits more, none is
    the answer.
    """
    counted = jnp.isfinite(density)
    causal = jnp.sum((mass.start.astype(jnp.float32) + (mass.rows + 1) / 2) * mass.rows, axis=-1)
    most = jnp.sum(jnp.where(counted, density, 0) * causal, axis=(1, 2), keepdims=True)
    first = jnp.arange(mass.before.shape[-2] * KEY_TILE, dtype=jnp.int32) < sink
    rest = mass
    if asked is not None:
        seen = asked.columns.reshape(*asked.columns.shape[:-1], 1, -1, KEY_TILE) | asked.blocks[..., None]
        rest = mass._replace(before=jnp.where(seen, 0, mass.before))

    def at(octaves: Float[Array, "b 1 1"]) -> tuple[Array, Array]:
        columns, blocks = worth_a_visit(rest, jnp.broadcast_to(jnp.exp2(-octaves), density.shape))
        return (columns, blocks) if asked is None else (columns | asked.columns, blocks | asked.blocks)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        columns, blocks = at(middle)
        cells = jnp.where(counted, visited(mass, columns | first, blocks), 0)
        fits = jnp.sum(cells, axis=(1, 2), keepdims=True) <= most
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    none = jnp.zeros(most.shape, jnp.float32)
    octaves, _ = jax.lax.fori_loop(0, STEPS, halve, (none, jnp.full_like(none, OCTAVES)))
    return at(octaves)
