"""Which past keys a query tile visits, in units of 64: the form that the loop in `attention` walks."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from pallas_kernels import rule
from pallas_kernels.bands import NO_BAND, band_bitmap, listed_bands
from pallas_kernels.plan import SparsePlan, block_tiles
from pallas_kernels.plan_builders import compact
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE

UNITS = 4
"""Key tiles of one online-softmax step: enough for the matrix products, few enough to waste little on short lists."""

STEP = UNITS * KEY_TILE


@partial(
    jax.tree_util.register_dataclass, data_fields=["plan", "bands", "columns", "ascending", "bitmap"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is the same for all query tiles of a head: a plan, and its lists as they are walked.

    - `bands` `[b, n, R]`: the distances that count, ascending without gaps, then numbers that no key reaches.
    - `columns`, `ascending` `[b, n, C]`: of `rule.listed_columns`, C a multiple of 64.
    - `bitmap` `[b, n, w]`: `bands.band_bitmap` of the bands.
    """

    plan: SparsePlan
    bands: Int[Array, "b n R"] | None = None
    columns: Int[Array, "b n C"] | None = None
    ascending: Int[Array, "b n C"] | None = None
    bitmap: UInt32[Array, "b n w"] | None = None

    @staticmethod
    def of(plan: SparsePlan | None, kv_len: int) -> Prepared | None:
        if plan is None:
            return None
        bands = columns = ascending = bitmap = None
        if plan.columns is not None and plan.column_count is not None:
            columns, ascending = rule.listed_columns(plan.columns, plan.column_count, kv_len, clean=plan.clean)
            room = ((0, 0), (0, 0), (0, -columns.shape[-1] % KEY_TILE))
            columns = jnp.pad(columns, room, constant_values=-1)
            ascending = jnp.pad(ascending, room, constant_values=jnp.iinfo(jnp.int32).max)
        if plan.bands is not None and plan.band_count is not None and plan.bands.shape[-1] > 0:
            lead, width = plan.bands.shape[:-1], plan.bands.shape[-1]
            blocks = None if plan.block_count is None else plan.block_count.reshape(-1, plan.block_count.shape[-1])
            flat = plan.bands.reshape(-1, width), plan.band_count.reshape(-1), blocks
            bands = listed_bands(*flat, multiple=plan.band_multiple, clean=plan.clean)
            if columns is not None:
                bitmap = band_bitmap(bands, kv_len + QUERY_TILE).reshape(*lead, -1)
            # Half the integers: differences of a distance and a position must not overflow.
            bands = jnp.where(bands == NO_BAND, NO_BAND // 2, bands).reshape(*lead, width)
        return Prepared(plan, bands, columns, ascending, bitmap)


@dataclasses.dataclass(frozen=True)
class Visit:
    """The past keys that one query tile visits, in units of 64: bands, then blocks, then tiles of gathered columns."""

    units: Int[Array, "p g"]
    tiles: Int[Array, "p g w"] | None = None  # first key of each band and block; None: every past key, contiguous
    tile_count: Int[Array, "p g"] | None = None
    cut: Int[Array, "p g w"] | None = None  # keys at the end of a tile that do not count: those of a band before key 0
    columns: Int[Array, "p g C"] | None = None
    keep: Bool[Array, "p g C"] | None = None  # columns that no visited tile holds

    @property
    def steps(self) -> Int[Array, ""]:
        return (self.units.max() + UNITS - 1) // UNITS

    def sources(self, step: Int[Array, ""]) -> tuple[Int[Array, "*heads u"], Int[Array, "*heads u"] | None]:
        """First key of each unit of a step, and its tile of gathered columns (negative where the key tile counts).

        Both are [p, g, u]; without a plan the keys are the same for all heads: [u].
        """
        unit = step * UNITS + jnp.arange(UNITS, dtype=jnp.int32)
        if self.tiles is None or self.tile_count is None:
            return unit * KEY_TILE, None
        start = jnp.take(self.tiles, unit, axis=-1, mode="clip")
        return start, None if self.columns is None else unit - self.tile_count[..., None]

    def visible(self, step: Int[Array, ""]) -> Bool[Array, "p g w"]:
        """Which of a step's keys count."""
        unit = step * UNITS + jnp.arange(UNITS, dtype=jnp.int32)
        lanes = jnp.broadcast_to((unit < self.units[..., None])[..., None], (*self.units.shape, UNITS, KEY_TILE))
        if self.cut is not None and self.tile_count is not None:
            whole = KEY_TILE - jnp.take(self.cut, unit, axis=-1, mode="clip")[..., None]
            is_column = unit[:, None] >= self.tile_count[..., None, None]
            lanes = lanes & (is_column | (jnp.arange(KEY_TILE, dtype=jnp.int32) < whole))
        if self.keep is not None and self.tile_count is not None:
            tile = unit - self.tile_count[..., None]
            keep = self.keep.reshape(*self.units.shape, -1, KEY_TILE)
            keep = jnp.take_along_axis(keep, tile[..., None], axis=2, mode="clip")
            lanes = lanes & (keep | (tile < 0)[..., None])
        return lanes.reshape(*self.units.shape, STEP)

    def positions(self, step: Int[Array, ""]) -> Int[Array, "*pg w"]:
        """Key positions of a step (a dense step's are contiguous and shared: [w])."""
        start, column_tile = self.sources(step)
        lane = jnp.arange(KEY_TILE, dtype=jnp.int32)
        position = start[..., None] + lane
        if column_tile is not None and self.columns is not None:
            index = (column_tile[..., None] * KEY_TILE + lane).reshape(*self.units.shape, STEP)
            columns = jnp.take_along_axis(self.columns, index, axis=-1, mode="clip")
            position = jnp.where((column_tile >= 0)[..., None], columns.reshape(position.shape), position)
        return position.reshape(*position.shape[:-2], STEP)


def visit_of(
    prepared: Prepared | None,
    i: Int[Array, ""],
    limit: Int[Array, " p"],
    q_offset: Int[Array, ""],
    kv_len: int,
    g: int,
) -> Visit:
    """What query tile `i` visits, in p pairs of sequence and KV head of g query heads each.

    **Arguments:** `prepared`: None for every past key; `limit`: keys of each sequence.
    """
    q0 = q_offset + i * QUERY_TILE
    live = (q0 < limit)[:, None]  # a query tile with no valid row visits nothing
    if prepared is None:
        return Visit(jnp.broadcast_to(jnp.where(live, q0 // KEY_TILE, 0), (limit.shape[0], g)))
    tiles, tile_count, cut = (
        jnp.zeros((limit.shape[0], g, 1), jnp.int32),
        jnp.zeros((limit.shape[0], g), jnp.int32),
        None,
    )
    in_block = None
    if prepared.bands is not None:
        # Distances that count, ascending: those that reach a key at or after 0 are a prefix.
        reaching = (prepared.bands < rule.reach(q0)) & live[..., None]
        tiles, tile_count = rule.band_start(prepared.bands, q0), reaching.sum(-1, dtype=jnp.int32)
        cut = rule.band_cut(prepared.bands, q0)
    if prepared.plan.blocks is not None:
        in_block = block_tiles(prepared.plan, i, kv_len, q_offset)
        blocks, block_count = compact(in_block & live[..., None], in_block.shape[-1])
        # After the bands that reach: a head that has both has bands of whole tiles, so nothing of it is cut.
        place = jnp.arange(tiles.shape[-1] + blocks.shape[-1], dtype=jnp.int32) - tile_count[..., None]
        from_blocks = jnp.take_along_axis(blocks, place, axis=-1, mode="clip") * KEY_TILE
        room = ((0, 0), (0, 0), (0, blocks.shape[-1]))
        tiles = jnp.where(place < 0, jnp.pad(tiles, room), from_blocks)
        cut = None if cut is None else jnp.where(place < 0, jnp.pad(cut, room), 0)
        tile_count = tile_count + block_count
    if prepared.columns is None or prepared.ascending is None:
        return Visit(tile_count, tiles, tile_count, cut)
    columns = prepared.columns
    bitmap = None if prepared.bitmap is None else prepared.bitmap.reshape(-1, prepared.bitmap.shape[-1])
    keep = rule.seen_columns(columns.reshape(-1, columns.shape[-1]), q0, bitmap).reshape(columns.shape)
    keep &= live[..., None]
    if in_block is not None:
        keep &= ~jnp.take_along_axis(in_block, jnp.maximum(columns, 0) // KEY_TILE, axis=-1, mode="clip")
    before = (prepared.ascending < q0) & live[..., None]
    # Those before the query tile are a prefix. Where no column of it counts, none is visited.
    prefix = jnp.where(keep.any(-1), before.sum(-1, dtype=jnp.int32), 0)
    column_units = (prefix + KEY_TILE - 1) // KEY_TILE
    return Visit(tile_count + column_units, tiles, tile_count, cut, columns, keep)
