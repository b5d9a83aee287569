"""Which columns and blocks are worth a visit, given the attention mass on every key and in every tile.

A threshold on the mean weight decides.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.plan import KEY_TILE

ROUNDS = 2
"""How often blocks are chosen beside the columns, and columns beside these blocks."""


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
    """Mean weight of each key over the rows whose blocks do not hold it; negative where there is no such row."""
    open_tiles = mass.past() & ~blocks
    cells = jnp.sum(jnp.where(open_tiles, mass.rows[..., None], 0), axis=-2)[..., None]  # [b, k, g, kt, 1]
    found = jnp.sum(jnp.where(open_tiles[..., None], mass.before, 0), axis=-3)
    return jnp.where(cells > 0, found / jnp.maximum(cells, 1), -1)


def block_worth(mass: Mass, columns: Bool[Array, "b k g kt 64"]) -> Float[Array, "b k g i kt"]:
    """Mean weight of each tile's keys that are no columns; negative for a tile that is not before the query tile."""
    rest = jnp.sum(jnp.where(columns[..., None, :, :], 0, mass.before), axis=-1)
    keys = jnp.maximum(KEY_TILE - columns.sum(-1, dtype=jnp.int32), 1).astype(jnp.float32)
    cells = keys[..., None, :] * mass.rows[..., None]
    return jnp.where(mass.past() & (mass.rows > 0)[..., None], rest / jnp.maximum(cells, 1), -1)


def worth_a_visit(
    mass: Mass, threshold: Float[Array, "b k g"]
) -> tuple[Bool[Array, "b k g x"], Bool[Array, "b k g i kt"]]:
    """The columns and blocks whose keys have at least this mean weight, where no other part visits them.

    Each of the two depends on the other: columns without blocks first, then twice blocks without the keys that are
    columns, and columns without the rows whose blocks hold them.
    """
    level = threshold[..., None, None]
    blocks = jnp.zeros(mass.before.shape[:-1], bool)
    columns = column_worth(mass, blocks) >= level
    for _ in range(ROUNDS):
        blocks = block_worth(mass, columns) >= level
        columns = column_worth(mass, blocks) >= level
    return columns.reshape(*columns.shape[:-2], -1), blocks


def held(mass: Mass, columns: Bool[Array, "b k g x"], blocks: Bool[Array, "b k g i kt"]) -> Float[Array, "b k g"]:
    """Mass on the visited keys."""
    columns = columns.reshape(*columns.shape[:-1], 1, -1, KEY_TILE)
    return mass.diagonal + jnp.sum(jnp.where(blocks[..., None] | columns, mass.before, 0), axis=(-1, -2, -3))
