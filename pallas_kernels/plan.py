"""SparsePlan: the one description of which keys a query tile visits.

A plan is read by every implementation, by the tests and by the pictures. `to_mask` is its meaning, spelled out as
a dense boolean array; the kernels never build that array.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import rule
from pallas_kernels.bands import kept_bands
from pallas_kernels.checks import check_lengths, check_q_offset
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE, num_key_tiles, num_query_tiles
from pallas_kernels.spread import PER_HEAD, PER_SEQUENCE, WHOLE, by_device
from pallas_kernels.tracing import under_own_settings

_PARTS = {"columns": "column_count", "bands": "band_count", "blocks": "block_count"}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["columns", "column_count", "bands", "band_count", "blocks", "block_count"],
    meta_fields=["band_multiple", "clean"],
)
@dataclasses.dataclass(frozen=True)
class SparsePlan:
    """What each query tile of each head visits, as int32 arrays of static width.

    A query row at position t sees key s if s <= t, s < length, and s lies in one of

    - the diagonal: the two key tiles that hold the row's own query tile. It is always visited and never listed;
    - a band: for a listed distance r, and with q0 the first position of the row's query tile, the 64 keys [q0 - r, q0 -
      r + 64), cut at key 0;
    - a block: a listed key tile of the row's query tile;
    - a column: a listed key position.

    A key that lies in several of them counts once. A head may use any mix of the three parts, so heads of different
    patterns share one launch.

    **Fields** (a part that no head uses is None, and so is its count):

    - `columns`: int32 `[b, n, C]`, ascending key positions; `column_count`: int32 `[b, n]`.
    - `bands`: int32 `[b, n, R]`, ascending distances; `band_count`: int32 `[b, n]`. Distances are 64 or more, and at
      least 64 apart. In a head that has blocks too they are multiples of 64.
    - `blocks`: int32 `[b, n, i, M]`, ascending key-tile numbers (key position // 64) for each query tile i;
      `block_count`: int32 `[b, n, i]`.
    - `band_multiple` (static): a number that every distance is a multiple of. With 64 a kernel copies whole tiles,
      faster.
    - `clean` (static): a promise that the lists below their counts need no checks. They are in order; nothing in them
      is to be ignored but what lies past the last key or after the diagonal; no block of a head lies in one of its
      bands. A kernel takes such lists as they are, and a broken promise makes wrong results. The builders and the index
      keep it; `plan_check.lists_are_clean` says whether a plan does.

    **Ignored**, whatever it is: entries at or past the count; entries out of range (negative, past the last key, after
    the diagonal); repeats; columns and blocks that are less than one listed before them; bands less than 64 after a
    listed one before them, since they would overlap it; bands that are no multiple of `band_multiple`, or of 64 in a
    head with blocks. `pallas_kernels.rule` has all of this as functions.

    Source: MInference (arXiv 2407.02490) §3.2 for the patterns. The official index lists slashes as tiles, anew for
    each query tile. A slash keeps its distance from one query tile to the next, so here a band says it once for a head.
    """

    columns: Int[Array, "b n C"] | None = None
    column_count: Int[Array, "b n"] | None = None
    bands: Int[Array, "b n R"] | None = None
    band_count: Int[Array, "b n"] | None = None
    blocks: Int[Array, "b n i M"] | None = None
    block_count: Int[Array, "b n i"] | None = None
    band_multiple: int = 1
    clean: bool = False

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
        """(batch, heads); None for the plan without parts, which visits the diagonal only and fits any."""
        for name in _PARTS:
            part = getattr(self, name)
            if part is not None:
                return part.shape[:2]
        return None

    @under_own_settings
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
        arrays = (self, check_q_offset(q_offset, q_len, kv_len), self._lengths(lengths, kv_len))
        return by_device(_mask, arrays, _AXES, PER_HEAD, q_len=q_len, kv_len=kv_len)

    @under_own_settings
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

        Cost: one pass over query tiles, each over the lists of every head.
        """
        arrays = (self, check_q_offset(q_offset, q_len, kv_len), self._lengths(lengths, kv_len))
        return by_device(_density, arrays, _AXES, PER_HEAD, q_len=q_len, kv_len=kv_len)

    def _lengths(self, lengths: Any, kv_len: int) -> Int[Array, " b"] | None:
        shape = self.shape()
        if lengths is None:
            return None
        batch = np.shape(lengths)[0] if shape is None and np.ndim(lengths) else (shape or (1, 1))[0]
        return check_lengths(lengths, batch, kv_len)


_AXES = (PER_HEAD, WHOLE, PER_SEQUENCE)


@partial(jax.jit, static_argnames=("q_len", "kv_len"))
def _mask(
    plan: SparsePlan, q_offset: Int[Array, ""], lengths: Int[Array, " b"] | None, *, q_len: int, kv_len: int
) -> Bool[Array, "b n t s"]:
    b, n = plan.shape() or (1 if lengths is None else lengths.shape[0], 1)
    plan.validate(b, n, q_len)
    rows = q_offset + jnp.arange(q_len, dtype=jnp.int32)
    keys = jnp.arange(kv_len, dtype=jnp.int32)
    tiles = jax.vmap(lambda i: visited_keys(plan, i, kv_len, q_offset, (b, n)), out_axes=2)(
        jnp.arange(num_query_tiles(q_len), dtype=jnp.int32)
    )
    mask = tiles[:, :, jnp.arange(q_len, dtype=jnp.int32) // QUERY_TILE]
    if plan.columns is not None and plan.column_count is not None:
        mask = mask | _column_flags(plan.columns, plan.column_count, kv_len)[:, :, None, :]
    causal = keys[None, :] <= rows[:, None]
    limit = kv_limit(lengths, b, kv_len)[:, None, None, None]
    return mask & causal & (keys < limit) & (rows[:, None] < limit)


@partial(jax.jit, static_argnames=("q_len", "kv_len"))
def _density(
    plan: SparsePlan, q_offset: Int[Array, ""], lengths: Int[Array, " b"] | None, *, q_len: int, kv_len: int
) -> Float[Array, "b n"]:
    b, n = plan.shape() or (1 if lengths is None else lengths.shape[0], 1)
    plan.validate(b, n, q_len)
    limit = kv_limit(lengths, b, kv_len)[:, None]
    if plan.clean and plan.columns is None and plan.bands is None and plan.blocks is not None:
        return _density_of_lists(plan, q_offset, jnp.minimum(limit, q_offset + q_len), num_query_tiles(q_len))
    tile_keys = num_key_tiles(kv_len) * KEY_TILE
    columns_before = None  # number of columns before each key, [b, n, keys + 1]
    if plan.columns is not None and plan.column_count is not None:
        flags = _column_flags(plan.columns, plan.column_count, kv_len)
        flags = jnp.pad(flags, ((0, 0), (0, 0), (1, tile_keys - kv_len)))
        columns_before = jnp.cumsum(flags, axis=-1, dtype=jnp.int32)
    kept = _kept(plan)

    def columns_up_to(key: Int[Array, "b n *w"]) -> Int[Array, "b n *w"]:
        assert columns_before is not None
        index = key.reshape(b, n, -1)
        return jnp.take_along_axis(columns_before, index, axis=-1, mode="clip").reshape(key.shape)

    def cells(i: Int[Array, ""]) -> tuple[Float[Array, "b n"], Float[Array, "b 1"]]:
        q0 = q_offset + i * QUERY_TILE
        rows = jnp.clip(jnp.minimum(limit, q_offset + q_len) - q0, 0, QUERY_TILE).astype(jnp.float32)
        keys = jnp.zeros((b, n), jnp.int32)
        if columns_before is not None:
            keys = columns_up_to(jnp.broadcast_to(jnp.minimum(q0, tile_keys), (b, n)))
        if kept is not None and plan.bands is not None:
            start = q0 - plan.bands
            start, end = jnp.clip(start, 0, tile_keys), jnp.clip(start + KEY_TILE, 0, tile_keys)
            new = end - start
            if columns_before is not None:
                new -= columns_up_to(end) - columns_up_to(start)
            keys += jnp.where(kept, new, 0).sum(-1)
        if plan.blocks is not None:
            new = jnp.int32(KEY_TILE)
            if columns_before is not None:
                edges = columns_before[..., ::KEY_TILE]
                new -= edges[..., 1:] - edges[..., :-1]
            keys += jnp.where(block_tiles(plan, i, kv_len, q_offset), new, 0).sum(-1)
        diagonal = rows * (rows + 1) / 2
        return keys.astype(jnp.float32) * rows + diagonal, q0.astype(jnp.float32) * rows + diagonal

    visited, causal = jax.lax.map(cells, jnp.arange(num_query_tiles(q_len), dtype=jnp.int32), batch_size=16)
    return visited.sum(0) / jnp.maximum(causal.sum(0), 1)


def _density_of_lists(
    plan: SparsePlan, q_offset: Int[Array, ""], end: Int[Array, "b 1"], query_tiles: int
) -> Float[Array, "b n"]:
    """The same where lists of blocks without repeats are all there is, by a few looks at each. Every layer of a model
    asks for it, so that what it leaves can go to later layers."""
    assert plan.blocks is not None and plan.block_count is not None
    first = (q_offset + QUERY_TILE * jnp.arange(query_tiles, dtype=jnp.int32))[None, None]  # [1, 1, i]
    rows = jnp.clip(end[..., None] - first, 0, QUERY_TILE).astype(jnp.float32)
    past = rule.past_in_order(plan.blocks, plan.block_count, first)
    diagonal = rows * (rows + 1) / 2
    causal = (first.astype(jnp.float32) * rows + diagonal).sum(-1)
    return ((KEY_TILE * past).astype(jnp.float32) * rows + diagonal).sum(-1) / jnp.maximum(causal, 1)


# Programs that take or give plans can be exported (`jax.export`), their static fields as JSON.
jax.export.register_pytree_node_serialization(
    SparsePlan,
    serialized_name="pallas_kernels.SparsePlan",
    serialize_auxdata=lambda fields: json.dumps(fields).encode(),
    deserialize_auxdata=lambda raw: tuple(json.loads(raw)),
)


def kv_limit(lengths: Int[Array, " b"] | None, batch: int, kv_len: int) -> Int[Array, " b"]:
    """Keys of each sequence: `lengths` clamped to [0, kv_len], or kv_len for all."""
    if lengths is None:
        return jnp.full((batch,), kv_len, jnp.int32)
    return jnp.clip(lengths.astype(jnp.int32), 0, kv_len)


def _kept(plan: SparsePlan) -> Bool[Array, "b n R"] | None:
    if plan.bands is None or plan.band_count is None:
        return None
    return kept_bands(plan.bands, plan.band_count, plan.block_count, multiple=plan.band_multiple)


def block_tiles(plan: SparsePlan, i: Int[Array, ""], kv_len: int, q_offset: Int[Array, ""]) -> Bool[Array, "b n kt"]:
    """Key tiles before the diagonal that query tile `i` (a traced scalar) visits as blocks, each once.

    Those that a band covers too are left out, so that blocks, bands, diagonal and columns can be counted apart.
    """
    assert plan.blocks is not None and plan.block_count is not None
    kt = num_key_tiles(kv_len)
    blocks, q0 = plan.blocks[:, :, i], q_offset + i * QUERY_TILE
    tiles = _flags(blocks, rule.past_blocks(blocks, plan.block_count[:, :, i], q0, clean=plan.clean), size=kt)
    kept = _kept(plan)
    if plan.bands is None or kept is None:
        return tiles
    # In a head with blocks, bands are multiples of the tile.
    band = q0 // KEY_TILE - plan.bands // KEY_TILE
    return tiles & ~_flags(band, kept & (band >= 0), size=kt)


def visited_keys(
    plan: SparsePlan, i: Int[Array, ""], kv_len: int, q_offset: Int[Array, ""], shape: tuple[int, int]
) -> Bool[Array, "b n s"]:
    """Keys that query tile `i` (a traced scalar) visits in whole tiles: diagonal, bands and blocks; not its columns.

    Keys after the query tile are never set.
    """
    q0 = q_offset + i * QUERY_TILE
    key = jnp.arange(kv_len, dtype=jnp.int32)
    visited = jnp.broadcast_to((key >= q0) & (key < q0 + QUERY_TILE), (*shape, kv_len))
    kept = _kept(plan)
    if plan.bands is not None and kept is not None:
        # +1 where a tile starts and -1 after its end: tiles are disjoint, so the running sum is 0 or 1.
        start = q0 - plan.bands
        kept &= plan.bands < rule.reach(q0)
        starts, ends = (jnp.where(kept, jnp.clip(x, 0, kv_len), kv_len) for x in (start, start + KEY_TILE))
        head = jnp.arange(shape[0] * shape[1], dtype=jnp.int32)[:, None]
        edges = jnp.zeros((head.size, kv_len), jnp.int32)
        for x, sign in ((starts, 1), (ends, -1)):
            edges = edges.at[head, x.reshape(head.size, -1)].add(sign, mode="drop")
        visited |= (jnp.cumsum(edges, axis=-1) > 0).reshape(*shape, kv_len)
    if plan.blocks is not None:
        tiles = block_tiles(plan, i, kv_len, q_offset)
        visited |= jnp.repeat(tiles, KEY_TILE, axis=-1, total_repeat_length=tiles.shape[-1] * KEY_TILE)[..., :kv_len]
    return visited


def _column_flags(columns: Int[Array, "b n C"], count: Int[Array, "b n"], kv_len: int) -> Bool[Array, "b n s"]:
    """The keys that are columns of a head, whatever else sees them."""
    columns, _ = rule.listed_columns(columns, count, kv_len, clean=False)
    return _flags(columns, columns >= 0, size=kv_len)


def _flags(values: Int[Array, "b n w"], valid: Bool[Array, "b n w"], *, size: int) -> Bool[Array, "b n size"]:
    """A flag for each number below `size`: whether it is among the valid values, none of which is negative."""
    b, n, _ = values.shape
    place = jnp.where(valid, values, size)
    sequence, head = jnp.arange(b)[:, None, None], jnp.arange(n)[None, :, None]
    return jnp.zeros((b, n, size), bool).at[sequence, head, place].set(True, mode="drop")
