"""SparsePlan: the one description of which keys a query tile visits.

A plan is read by every implementation, by the tests and by the pictures. `to_mask` is its meaning, spelled out as
a dense boolean array; the kernels never build that array.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERY_TILE = 128
"""Consecutive queries that share one list of key tiles."""

KEY_TILE = 64
"""Consecutive keys that are selected together."""

_PARTS = {"columns": "column_count", "bands": "band_count", "blocks": "block_count"}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["columns", "column_count", "bands", "band_count", "blocks", "block_count"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SparsePlan:
    """What each query tile of each head visits, as int32 arrays of static width.

    A query row at position t sees key s iff s <= t, s < length, and s lies in one of

    - the diagonal: the two key tiles that hold the row's own query tile (always visited);
    - a band: with q0 the first position of the row's query tile, the key tile [q0 - r, q0 - r + 64) for a listed
      distance r;
    - a block: a listed key tile of the row's query tile;
    - a column: a listed key position.

    A key that lies in several of them counts once. A head may use any mix of the three parts, so heads of
    different patterns share one launch.

    **Fields** (a part that no head uses is None, its count too):

    - `columns`: int32 `[b, n, C]`, ascending key positions; `column_count`: int32 `[b, n]`.
    - `bands`: int32 `[b, n, R]`, ascending distances, multiples of 64; `band_count`: int32 `[b, n]`.
    - `blocks`: int32 `[b, n, i, M]`, ascending key-tile numbers (key position // 64) of each query tile;
      `block_count`: int32 `[b, n, i]`.

    Entries at or past the count are ignored, whatever they hold. So are entries out of range (negative, past the
    last key, after the diagonal), bands that are no multiple of 64, and repeats.

    Source: MInference (arXiv 2407.02490) §3.2 for the patterns. The official index stores a tile list per query
    tile for slashes too; bands say the same once per head, because slash tiles are shift-invariant.
    """

    columns: Int[Array, "b n C"] | None = None
    column_count: Int[Array, "b n"] | None = None
    bands: Int[Array, "b n R"] | None = None
    band_count: Int[Array, "b n"] | None = None
    blocks: Int[Array, "b n i M"] | None = None
    block_count: Int[Array, "b n i"] | None = None

    def validate(self, batch: int, heads: int, q_len: int) -> None:
        """Raises ValueError, naming the part and both shapes, unless the plan fits `[batch, q_len, heads]` queries."""
        for name, count_name in _PARTS.items():
            part, count = getattr(self, name), getattr(self, count_name)
            if (part is None) != (count is None):
                raise ValueError(f"plan.{name} and plan.{count_name} must be given together; one of them is None")
            if part is None:
                continue
            lead = (batch, heads, num_query_tiles(q_len)) if name == "blocks" else (batch, heads)
            if part.ndim != len(lead) + 1 or part.shape[:-1] != lead:
                raise ValueError(f"plan.{name} has shape {part.shape}; expected {(*lead, 'width')}")
            if count.shape != lead:
                raise ValueError(f"plan.{count_name} has shape {count.shape}; expected {lead}")
            for what, array in ((name, part), (count_name, count)):
                if array.dtype != jnp.int32:
                    raise ValueError(f"plan.{what} has dtype {array.dtype}; expected int32")

    def shape(self) -> tuple[int, int] | None:
        """(batch, heads), or None for the plan that visits the diagonal only."""
        for name in _PARTS:
            part = getattr(self, name)
            if part is not None:
                return part.shape[:2]
        return None

    def to_mask(
        self,
        q_len: int,
        kv_len: int,
        *,
        q_offset: int | Int[Array, ""] = 0,
        lengths: Int[Array, " b"] | None = None,
    ) -> Bool[Array, "b n t s"]:
        """The plan as a dense boolean mask: the slow truth that every implementation is tested against.

        **Arguments:** `q_len`, `kv_len`: static numbers of query rows and keys. `q_offset`: position of the first
        query row, a multiple of 128. `lengths`: int32 `[b]`, keys of each sequence (default: all of `kv_len`).

        **Returns:** bool `[b, n, q_len, kv_len]`; rows at or past a sequence's length are False everywhere.

        Memory: b·n·q_len·kv_len bytes. For tests and pictures, not for long sequences.
        """
        b, n = self.shape() or (1 if lengths is None else lengths.shape[0], 1)
        self.validate(b, n, q_len)
        q_offset = jnp.asarray(q_offset, jnp.int32)
        rows = q_offset + jnp.arange(q_len, dtype=jnp.int32)
        keys = jnp.arange(kv_len, dtype=jnp.int32)
        tiles = jax.vmap(lambda i: visited_tiles(self, i, kv_len, q_offset, (b, n)), out_axes=2)(
            jnp.arange(num_query_tiles(q_len), dtype=jnp.int32)
        )
        mask = tiles[:, :, jnp.arange(q_len) // QUERY_TILE][..., jnp.arange(kv_len) // KEY_TILE]
        if self.columns is not None and self.column_count is not None:
            is_column = jax.vmap(jax.vmap(partial(_members, size=kv_len)))(self.columns, self.column_count)
            mask = mask | is_column[:, :, None, :]
        causal = keys[None, :] <= rows[:, None]
        limit = kv_limit(lengths, b, kv_len)[:, None, None, None]
        return mask & causal & (keys < limit) & (rows[:, None] < limit)

    def density(
        self,
        q_len: int,
        kv_len: int,
        *,
        q_offset: int | Int[Array, ""] = 0,
        lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b n"]:
        """Share of the causal (query, key) cells that the plan visits, without building the mask.

        **Arguments:** as `to_mask`. **Returns:** float32 `[b, n]`, in [0, 1]; 0 for a sequence with no valid row.

        Cost: one pass over query tiles, each with a bitmap of kv_len / 64 tiles per head.
        """
        b, n = self.shape() or (1 if lengths is None else lengths.shape[0], 1)
        self.validate(b, n, q_len)
        q_offset = jnp.asarray(q_offset, jnp.int32)
        limit = kv_limit(lengths, b, kv_len)[:, None]
        is_column = None
        if self.columns is not None and self.column_count is not None:
            flags = jax.vmap(jax.vmap(partial(_members, size=num_key_tiles(kv_len) * KEY_TILE)))(
                self.columns, self.column_count
            )
            is_column = flags.reshape(b, n, -1, KEY_TILE).sum(-1, dtype=jnp.float32)  # columns in each key tile

        def cells(i: Int[Array, ""]) -> tuple[Float[Array, "b n"], Float[Array, "b 1"]]:
            q0 = q_offset + i * QUERY_TILE
            rows = jnp.clip(jnp.minimum(limit, q_offset + q_len) - q0, 0, QUERY_TILE).astype(jnp.float32)
            tiles = visited_tiles(self, i, kv_len, q_offset, (b, n))
            past = jnp.arange(tiles.shape[-1], dtype=jnp.int32) < q0 // KEY_TILE
            keys = jnp.where(tiles & past, jnp.float32(KEY_TILE), jnp.float32(0))
            if is_column is not None:
                keys = keys + jnp.where(past & ~tiles, is_column, jnp.float32(0))
            diagonal = rows * (rows + 1) / 2
            return keys.sum(-1) * rows + diagonal, q0.astype(jnp.float32) * rows + diagonal

        visited, causal = jax.lax.map(cells, jnp.arange(num_query_tiles(q_len), dtype=jnp.int32), batch_size=16)
        return visited.sum(0) / jnp.maximum(causal.sum(0), 1)


def num_query_tiles(q_len: int) -> int:
    """Query tiles that cover `q_len` rows."""
    return -(-q_len // QUERY_TILE)


def num_key_tiles(kv_len: int) -> int:
    """Key tiles that cover `kv_len` keys."""
    return -(-kv_len // KEY_TILE)


def kv_limit(lengths: Int[Array, " b"] | None, batch: int, kv_len: int) -> Int[Array, " b"]:
    """Keys of each sequence: `lengths` clamped to [0, kv_len], or kv_len for all."""
    if lengths is None:
        return jnp.full((batch,), kv_len, jnp.int32)
    return jnp.clip(lengths.astype(jnp.int32), 0, kv_len)


def visited_tiles(
    plan: SparsePlan, i: Int[Array, ""], kv_len: int, q_offset: Int[Array, ""], shape: tuple[int, int]
) -> Bool[Array, "b n kt"]:
    """Key tiles that query tile `i` (a traced scalar) visits whole: diagonal, bands and blocks, each tile once.

    Columns are not included. Tiles after the diagonal are never set.
    """
    kt = num_key_tiles(kv_len)
    diagonal = (q_offset + i * QUERY_TILE) // KEY_TILE
    tile = jnp.arange(kt, dtype=jnp.int32)
    visited = jnp.broadcast_to((tile >= diagonal) & (tile < diagonal + QUERY_TILE // KEY_TILE), (*shape, kt))
    if plan.bands is not None and plan.band_count is not None:
        # A band that is no multiple of the tile is moved out of range, where _members drops it.
        distance = jnp.where(plan.bands % KEY_TILE == 0, plan.bands // KEY_TILE, -1)
        band_tile = jnp.where(distance >= 0, diagonal - distance, -1)
        visited = visited | jax.vmap(jax.vmap(partial(_members, size=kt)))(band_tile, plan.band_count)
    if plan.blocks is not None and plan.block_count is not None:
        members = jax.vmap(jax.vmap(partial(_members, size=kt)))(plan.blocks[:, :, i], plan.block_count[:, :, i])
        visited = visited | members
    return visited & (tile < diagonal + QUERY_TILE // KEY_TILE)


def _members(values: Int[Array, " w"], count: Int[Array, ""], *, size: int) -> Bool[Array, " size"]:
    """flags[v] for v in values[:count]; values outside [0, size) are dropped (negative ones too)."""
    values = jnp.where((jnp.arange(values.shape[0]) < count) & (values >= 0), values, size)
    return jnp.zeros((size,), bool).at[values].set(True, mode="drop")
