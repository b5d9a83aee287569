"""Key tiles at one density for all heads of a layer: a level of the mean weight, found for each prompt.

Probe rows in every query tile say how much of their attention each key tile holds (`tile_masses`, or nearly so
`tile_keys`). The tiles with the highest mean weight are visited, whatever head they are of, until the layer has used up
its cells. Nothing here is larger than query tiles times key tiles, and that is read as 16-bit integers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16

from minference_jax.index.level import reaching
from minference_jax.index.probes import PROBES
from minference_jax.index.question import Columns, column_masses, open_keys, question_columns
from minference_jax.index.tile_mass import tile_rows
from pallas_kernels.index.masses import FORMS, MassImplementation, choose_masses, tile_keys, tile_masses
from pallas_kernels.index.tile_keys import TileRule
from pallas_kernels.plan import KEY_TILE, QUERY_TILE, SparsePlan, num_query_tiles

QUESTION_WIDTH = 1_024
"""Most question columns of a head unless said otherwise: a bias for each of them and query tile is what they cost."""


def shared_density_index(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    density: Float[Array, " n"],
    question: Int[Array, " n"] | None = None,
    threshold: Float[Array, "*b n"] | None = None,
    *,
    every: int,
    question_width: int | None = None,
    lengths: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
    axis_name: str | None = None,
    unspent: Float[Array, " b"] | None = None,
    implementation: MassImplementation | None = None,
) -> SparsePlan:
    """Key tiles of every head at one level for the heads of a layer, and the columns that the question asks for.

    Always visited: the diagonal, the first key tile, every key of the query tiles that hold the last 64 valid rows, and
    the question's columns. The heads of a finite density then visit the tiles of the highest mean weight until they
    have, together and in each sequence, the sum of their shares of the causal cells, counted as `plan.density` does,
    less at most one tile. What is always visited may be more than that.

    **Arguments:**

    - `density`: of each head, inf for a head that takes no part; such a head's lists are empty.
    - `question`: question columns of each head, at most `question_width` (static, by default 1,024 or all keys); None
      (static) where no head has any.
    - `threshold`: float32 `[n]` or `[b, n]`: tiles of a lower mean weight are not visited, though the density may allow
      it; None (static) for 0.
    - `every` (static): rows to a probe, a divisor of 128.
    - `lengths`, `q_offset`, `scale`: as `vertical_slash_index`.
    - `axis_name` (static): a mesh axis over which the heads of a layer are divided, inside `jax.shard_map`. The density
      is then that of the heads on all devices.
    - `unspent`: float32 `[b]`, added to the sum of the heads' densities: what earlier layers left, together.
    - `implementation` (static): as for `tile_masses`; "hopper" also chooses the tiles by kernels.

    **Returns:** blocks as wide as there are key tiles, with columns if `question` is given.

    Cost: the scores of t / every rows with the keys before them, and a few reads of a 16-bit number for each head,
    query tile and key tile. Memory: what the kernel of `tile_masses` leaves, 4 · 128 / every bytes for each of them;
    with products in FP8 an eighth more, and a byte for each number of the keys.
    """
    t, s = q.shape[1], k.shape[1]
    valid = jnp.clip(lengths - q_offset, 0, t)
    columns = None
    if question is not None:
        width = min(s, QUESTION_WIDTH if question_width is None else question_width)
        own = jnp.where(jnp.isfinite(density), question, 0)
        columns = question_columns(q, k, own, width, valid=valid, q_offset=q_offset, scale=scale)

    where: dict[str, Any] = {"q_offset": q_offset, "scale": scale}
    least = jnp.float32(0) if threshold is None else threshold
    least = jnp.broadcast_to(jnp.where(jnp.isfinite(density), least, jnp.inf), (q.shape[0], q.shape[2]))
    first = QUERY_TILE * jnp.arange(num_query_tiles(t), dtype=jnp.int32)
    rows = jnp.clip(valid[:, None] - first, 0, QUERY_TILE)
    end = (rows > 0) & (first + QUERY_TILE > valid[:, None] - PROBES)
    rule = TileRule(q_offset + first, rows, end, least)
    keys = _keys(q, k, valid, rule, columns, every=every, lengths=lengths, implementation=implementation, **where)

    most = _most(rule, valid, q_offset, density, columns, axis_name, unspent)
    counted = None if columns is None else open_keys(columns)
    kernels = FORMS[choose_masses(q, k, implementation).name].kernels
    blocks, block_count = reaching(keys, counted, rows, most, axis_name=axis_name, kernels=kernels)
    if columns is None:
        return SparsePlan(blocks=blocks, block_count=block_count, band_multiple=KEY_TILE, clean=True)
    return SparsePlan(
        columns.positions, columns.count, blocks=blocks, block_count=block_count, band_multiple=KEY_TILE, clean=True
    )


def _keys(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    valid: Int[Array, " b"],
    rule: TileRule,
    columns: Columns | None,
    *,
    every: int,
    lengths: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
    implementation: MassImplementation | None = None,
) -> UInt16[Array, "b n i j"]:
    """What a visit of each tile is worth: the mean attention weight of the cells that it adds.

    Keys that are columns are not part of it.
    """
    # A head that looks at the token before needs the tile before in the first row of a query tile alone, and the last
    # row of a prompt asks for what comes next.
    rows, share = tile_rows(valid, rule.start.shape[0], every, ends=True)
    where: dict[str, Any] = {"q_offset": q_offset, "scale": scale}
    masses: dict[str, Any] = where | {"lengths": lengths, "implementation": implementation}
    if columns is None:
        return tile_keys(q, k, rows, share, rule, **masses)
    held, lse = tile_masses(q, k, rows, share, return_lse=True, **masses)
    held = held - column_masses(q, k, columns, rows, share, lse, **where)
    return rule.keys(jnp.maximum(held, 0), open_keys(columns))  # by rounding it may be less


def _most(
    rule: TileRule,
    valid: Int[Array, " b"],
    q_offset: Int[Array, ""],
    density: Float[Array, " n"],
    columns: Columns | None,
    axis_name: str | None,
    unspent: Float[Array, " b"] | None,
) -> Float[Array, " b"]:
    """Cells of each sequence for tiles: the heads' shares and what is left over, less their diagonals and columns."""
    takes_part = jnp.isfinite(density)
    whole, rest, rows = (x.astype(jnp.float32) for x in (valid // QUERY_TILE, valid % QUERY_TILE, valid))
    diagonal = QUERY_TILE * (QUERY_TILE + 1) / 2 * whole + (rest + 1) / 2 * rest
    causal = (q_offset.astype(jnp.float32) + (rows + 1) / 2) * rows
    heads = jnp.stack([jnp.where(takes_part, density, 0).sum(), takes_part.sum().astype(jnp.float32)])
    spent = jnp.zeros(causal.shape, jnp.float32)
    if columns is not None:
        past = KEY_TILE * jnp.arange(columns.in_tile.shape[-1], dtype=jnp.int32) < rule.start[:, None]
        before = jnp.where(past, columns.in_tile[:, :, None], 0).sum(-1, dtype=jnp.int32)  # [b, n, i]
        spent = (before.astype(jnp.float32) * rule.rows[:, None].astype(jnp.float32)).sum((1, 2))
    if axis_name is not None:
        heads, spent = (jax.lax.psum(x, axis_name) for x in (heads, spent))
    share = heads[0] if unspent is None else heads[0] + unspent
    return share * causal - heads[1] * diagonal - spent
