"""Which columns and blocks are worth a visit, given the attention mass on every key and in every tile.

A threshold on the mean weight decides, which is given, or found such that a layer visits a given share of its cells.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.plan import KEY_TILE
from pallas_kernels.tracing import vary_alike

OCTAVES, STEPS = 32.0, 16
"""The threshold of a density lies within a factor of 2³² below 1, and is found to 1 / 2,048 of an octave: about what
one tile of a layer is worth at 1,024 tokens."""

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
    """Columns and blocks that the heads of a finite density visit together, in each sequence, in no more cells than the
    sum of their shares: those of the largest mean weight, nearly as `worth_a_visit` has them at one threshold.

    The first `sink` keys and what is `asked` for are visited first; the threshold decides about the rest. Where they
    alone are more than the shares, they are the answer.

    This reads all of the mass six times, for what columns and blocks are worth beside each other. Thresholds are found
    from these worths alone, which are 64 times smaller for blocks, and as many times as there are query tiles for
    columns.
    """
    counted = jnp.isfinite(density)
    causal = jnp.sum((mass.start.astype(jnp.float32) + (mass.rows + 1) / 2) * mass.rows, axis=-1)
    most = jnp.sum(jnp.where(counted, density, 0) * causal, axis=(1, 2), keepdims=True)
    shape = mass.before.shape
    first = jnp.arange(shape[-2] * KEY_TILE, dtype=jnp.int32).reshape(-1, KEY_TILE) < sink
    kept_columns, kept_blocks = jnp.broadcast_to(first, (*shape[:3], *shape[-2:])), jnp.zeros(shape[:-1], bool)
    if asked is not None:
        kept_columns, kept_blocks = kept_columns | asked.columns.reshape(kept_columns.shape), asked.blocks
    rest = mass._replace(before=jnp.where(kept_columns[..., None, :, :] | kept_blocks[..., None], 0, mass.before))

    def chosen(of_columns: Array, of_blocks: Array, octaves: Float[Array, "b 1 1"]) -> tuple[Array, Array]:
        level = jnp.exp2(-octaves)[..., None, None]
        return kept_columns | (of_columns >= level), kept_blocks | (of_blocks >= level)

    def best(of_columns: Float[Array, "b k g kt 64"], of_blocks: Float[Array, "b k g i kt"]) -> tuple[Array, Array]:
        """Columns and blocks at the smallest threshold at which they fit."""

        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low + high) / 2
            columns, blocks = chosen(of_columns, of_blocks, middle)
            cells = jnp.where(counted, visited(mass, columns.reshape(*shape[:3], -1), blocks), 0)
            fits = jnp.sum(cells, axis=(1, 2), keepdims=True) <= most
            return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

        none = jnp.full(most.shape, -1.0, jnp.float32)  # no mean weight reaches 2
        ends = vary_alike((none, jnp.full_like(none, OCTAVES)), of_columns, of_blocks, most)
        octaves, _ = jax.lax.fori_loop(0, STEPS, halve, ends)
        return chosen(of_columns, of_blocks, octaves)

    # To begin with, blocks are worth what they hold on all keys, columns or not.
    of_columns = column_worth(rest, kept_blocks)
    columns, blocks = best(of_columns, block_worth(rest, kept_columns))
    for _ in range(ROUNDS):
        of_blocks = block_worth(rest, columns)
        blocks = best(of_columns, of_blocks)[1]
        of_columns = column_worth(rest, blocks)
        columns, blocks = best(of_columns, of_blocks)
    return columns.reshape(*shape[:3], -1), blocks
