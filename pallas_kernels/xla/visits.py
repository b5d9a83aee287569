"""Which past keys a query tile visits, in units of 64, for the blockwise implementation in `xla.py`."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.bands import NO_BAND, band_bitmap, covered, listed_bands
from pallas_kernels.plan import SparsePlan, block_tiles
from pallas_kernels.plan_builders import compact
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE

UNITS = 4
"""Key tiles of one online-softmax step: enough for the matrix products, few enough to waste little on short lists."""

STEP = UNITS * KEY_TILE


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

    def sources(self, step: Int[Array, ""]) -> tuple[Int[Array, "p g u"], Int[Array, "p g u"] | None]:
        """First key of each unit of a step, and its tile of gathered columns (negative where the key tile counts)."""
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

    def positions(self, step: Int[Array, ""]) -> Int[Array, "p g w"]:
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
    plan: SparsePlan | None, i: Int[Array, ""], limit: Int[Array, " p"], q_offset: Int[Array, ""], kv_len: int, g: int
) -> Visit:
    q0 = q_offset + i * QUERY_TILE
    live = (q0 < limit)[:, None]  # a query tile with no valid row visits nothing
    if plan is None:
        return Visit(jnp.broadcast_to(jnp.where(live, q0 // KEY_TILE, 0), (limit.shape[0], g)))
    tiles, tile_count, cut = (
        jnp.zeros((limit.shape[0], g, 1), jnp.int32),
        jnp.zeros((limit.shape[0], g), jnp.int32),
        None,
    )
    in_block = None
    if plan.bands is not None:
        # Distances that count, ascending: those that reach a key at or after 0 are a prefix.
        reaching = (plan.bands < q0 + KEY_TILE) & live[..., None]
        tiles, tile_count = jnp.maximum(q0 - plan.bands, 0), reaching.sum(-1, dtype=jnp.int32)
        cut = jnp.clip(plan.bands - q0, 0, KEY_TILE)
    if plan.blocks is not None:
        in_block = block_tiles(plan, i, kv_len, q_offset)
        blocks, block_count = compact(in_block & live[..., None], in_block.shape[-1])
        # After the bands that reach: a head that has both has bands of whole tiles, so nothing of it is cut.
        place = jnp.arange(tiles.shape[-1] + blocks.shape[-1], dtype=jnp.int32) - tile_count[..., None]
        from_blocks = jnp.take_along_axis(blocks, place, axis=-1, mode="clip") * KEY_TILE
        room = ((0, 0), (0, 0), (0, blocks.shape[-1]))
        tiles = jnp.where(place < 0, jnp.pad(tiles, room), from_blocks)
        cut = None if cut is None else jnp.where(place < 0, jnp.pad(cut, room), 0)
        tile_count = tile_count + block_count
    if plan.columns is None or plan.column_count is None:
        return Visit(tile_count, tiles, tile_count, cut)
    before = (
        (jnp.arange(plan.columns.shape[-1], dtype=jnp.int32) < plan.column_count[..., None])
        & (plan.columns < q0)
        & live[..., None]
    )
    keep = before & (plan.columns >= 0)
    if in_block is not None:
        keep &= ~jnp.take_along_axis(in_block, plan.columns // KEY_TILE, axis=-1, mode="clip")
    if plan.bands is not None:
        flat = (x.reshape(-1, x.shape[-1]) for x in (plan.bands, q0 - plan.columns))
        listed, distance = flat
        keep &= ~covered(band_bitmap(listed, kv_len + QUERY_TILE), distance).reshape(keep.shape)
    keep = keep & ~jnp.pad(plan.columns[..., 1:] == plan.columns[..., :-1], ((0, 0), (0, 0), (1, 0)))
    # Ascending columns: those before the query tile are a prefix. Where no column of it counts, none is visited.
    prefix = jnp.where(keep.any(-1), before.sum(-1, dtype=jnp.int32), 0)
    column_units = (prefix + KEY_TILE - 1) // KEY_TILE
    return Visit(tile_count + column_units, tiles, tile_count, cut, plan.columns, keep)


def prepared(plan: SparsePlan | None) -> SparsePlan | None:
    """The plan with its bands listed without gaps, and its columns widened to whole key tiles past their count."""
    if plan is None:
        return None
    if plan.columns is not None:
        pad = -plan.columns.shape[-1] % KEY_TILE
        plan = dataclasses.replace(plan, columns=jnp.pad(plan.columns, ((0, 0), (0, 0), (0, pad))))
    if plan.bands is not None and plan.bands.shape[-1] == 0:
        plan = dataclasses.replace(plan, bands=None, band_count=None)
    if plan.bands is not None and plan.band_count is not None:
        shape, width = plan.bands.shape, plan.bands.shape[-1]
        blocks = None if plan.block_count is None else plan.block_count.reshape(-1, plan.block_count.shape[-1])
        rules = {"multiple": plan.band_multiple, "clean": plan.clean}
        bands = listed_bands(plan.bands.reshape(-1, width), plan.band_count.reshape(-1), blocks, **rules)
        count = (bands != NO_BAND).sum(-1, dtype=jnp.int32)
        # Half the integers: differences of a distance and a position must not overflow.
        bands = jnp.where(bands == NO_BAND, NO_BAND // 2, bands)
        plan = dataclasses.replace(plan, bands=bands.reshape(shape), band_count=count.reshape(shape[:-1]))
    return plan
