"""Which columns and blocks are worth a visit, given the attention mass on every key and in every tile.

A column is one key, seen by all later query tiles. A block is one key tile, seen by one query tile:

    query tile 0   ╲            c: a column, in every query tile below it
    query tile 1   c ╲          █: a block of query tile 3
    query tile 2   c   ╲
    query tile 3   c █   ╲      ╲: the diagonal, always visited

What decides is a mean weight: the attention mass on the cells that a column or block would add, divided by the number
of these cells. It is worth a visit if that mean reaches a threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.plan import KEY_TILE

ROUNDS = 2
"""Rounds of choosing: in each, blocks are chosen anew given the columns, then columns given these blocks."""


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


def column_worth(mass: Mass, blocks: Bool[Array, "b k g i kt"]) -> Float[Array, "b k g kt 64"]:
    """Mean weight of each key over the query rows that would see it only as a column.

    Rows whose blocks hold the key already do not count. The value is −1 for a key that no row is left for.
    """
    open_tiles = mass.past() & ~blocks
    cells = jnp.sum(jnp.where(open_tiles, mass.rows[..., None], 0), axis=-2)[..., None]  # [b, k, g, kt, 1]
    found = jnp.sum(jnp.where(open_tiles[..., None], mass.before, 0), axis=-3)
    return jnp.where(cells > 0, found / jnp.maximum(cells, 1), -1)


def block_worth(mass: Mass, columns: Bool[Array, "b k g kt 64"]) -> Float[Array, "b k g i kt"]:
    """Mean weight of each key tile for each query tile, over the keys of the tile that are no columns.

    The value is −1 for a key tile that does not lie before the query tile.
    """
    rest = jnp.sum(jnp.where(columns[..., None, :, :], 0, mass.before), axis=-1)
    keys = jnp.maximum(KEY_TILE - columns.sum(-1, dtype=jnp.int32), 1).astype(jnp.float32)
    cells = keys[..., None, :] * mass.rows[..., None]
    return jnp.where(mass.past() & (mass.rows > 0)[..., None], rest / jnp.maximum(cells, 1), -1)


def worth_a_visit(
    mass: Mass, threshold: Float[Array, "b k g"]
) -> tuple[Bool[Array, "b k g x"], Bool[Array, "b k g i kt"]]:
    """The columns and the blocks whose mean weight is at least `threshold`.

    Only cells that nothing else visits count, so columns depend on blocks and blocks on columns. They are found in
    turns: columns where there are no blocks yet, then `ROUNDS` times blocks beside these columns, and columns beside
    these blocks.
    """
    level = threshold[..., None, None]
    blocks = jnp.zeros(mass.before.shape[:-1], bool)
    columns = column_worth(mass, blocks) >= level
    for _ in range(ROUNDS):
        blocks = block_worth(mass, columns) >= level
        columns = column_worth(mass, blocks) >= level
    return columns.reshape(*columns.shape[:-2], -1), blocks


def held(mass: Mass, columns: Bool[Array, "b k g x"], blocks: Bool[Array, "b k g i kt"]) -> Float[Array, "b k g"]:
    """Attention mass of each head on the keys that are visited: diagonal, columns and blocks, each key once."""
    columns = columns.reshape(*columns.shape[:-1], 1, -1, KEY_TILE)
    return mass.diagonal + jnp.sum(jnp.where(blocks[..., None] | columns, mass.before, 0), axis=(-1, -2, -3))
