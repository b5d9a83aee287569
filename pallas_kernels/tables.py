"""What the kernels read of a plan, prepared in plain jnp but for the order of query tiles (`order`).

A kernel wants lists without gaps or repeats, and columns whose keys lie side by side in memory. This module makes
them from any `SparsePlan` in a few fused passes, at any length: nothing here is as large as queries times keys.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Int

from pallas_kernels import rule
from pallas_kernels.bands import NO_BAND, at_place, band_bitmap, covered, entries_before, listed_bands
from pallas_kernels.order import longest_first
from pallas_kernels.plan import SparsePlan, kv_limit
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE, num_query_tiles

# Fields of one query tile's row of `KernelTables.work`.
STEPS_NO_BIAS = 0  # the diagonal step and the steps of two whole key tiles end here
STEPS = 1  # all steps; 0 for a query tile without a valid row
BANDS = 2  # band tiles that hold a key at or after key 0
TILES = 3  # band tiles and block tiles
DIAGONAL = 4  # position of the query tile's first row
ROWS_VALID = 5  # rows before the sequence's length
TILES_NO_BIAS = 6  # band and block tiles but one that key 0 cuts
ALL_TILES = 7  # band, block and column tiles
WORK_FIELDS = 8  # padded to a power of two

# Without columns and bands: 0 for the last two whole tiles, -inf for a missing half. A constant takes no launch.
_BIAS_OF_NONE = np.full((1, 1, 4 * KEY_TILE), -np.inf, jnp.bfloat16)
_BIAS_OF_NONE[..., : 2 * KEY_TILE] = 0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["work", "bands", "blocks", "keys", "values", "bias", "last_values", "order"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class KernelTables:
    """The plan as a kernel reads it; `z` = b·n, heads of all sequences, `i` query tiles.

    The Hopper kernel takes two key tiles a step: the diagonal, then bands, blocks and columns as one list. From the
    first tile that needs one, a bias is added to the scores. For three bands, of which key 0 cuts the last, and 100
    columns:

        step          0           1         2                  3
        key tiles     diagonal    B1   B2   B3       c0        c1        none
        their bias    none                  64..127  128..191  192..255  256..319    places in the row of `bias`
        holds                               B3's cut, seen columns       -inf

    Fields:

    - `work`: int32 `[z, i, 8]`, the counts of each query tile (constants above).
    - `bands`: int32 `[z, R]`, distances in keys, ascending, no gaps or repeats, then `NO_BAND`. None without bands.
    - `blocks`: int32 `[z, i, M]`, key tiles: as many as `work` counts are in order and in no band. None without blocks.
    - `keys`, `values`: `[z, C, h]`, the keys and values of the columns, gathered, with 0 for what is not finite. None
      without columns.
    - `bias`: bf16 `[z, i, 128 + C' + 64]`, C' being C rounded up to 64: 0 for what is seen, -inf for what is not, NaN
      for a column that is seen and whose key or value is not finite: its rows are NaN, those before it are not.
      The first 128 entries are for the last two whole tiles, for when one of them shares a step with columns: -inf for
      keys that a band cut at key 0 does not hold. The next C' are for the columns: -inf where the query tile sees that
      key elsewhere, or not at all. The last 64 are -inf, for a step whose second half is missing. With neither columns
      nor bands all query tiles share one row: `[1, 1, 256]`.
    - `last_values`: `[b, 128, k, h]`, the values beside each sequence's last query tile, 0 past its end: a weight of 0
      would not silence a NaN that the padding holds. Read in place of v where that tile has fewer than 128 valid rows.
      None without lengths.
    - `order`: int32 `[z · i]`, in which order to take query tiles: the place of each among all heads' tiles, the heads
      one after the other and each one's tiles from the last to the first. None: in that order itself.
    """

    work: Int[Array, "z i 8"]
    bands: Int[Array, "z R"] | None
    blocks: Int[Array, "z i M"] | None
    keys: Float[Array, "z C h"] | None
    values: Float[Array, "z C h"] | None
    bias: BFloat16[Array, "z i W"]
    last_values: Float[Array, "b 128 k h"] | None
    order: Int[Array, " w"] | None


def prepare(
    plan: SparsePlan,
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    lengths: Int[Array, " b"] | None,
    q_offset: Int[Array, ""],
) -> KernelTables:
    """Tables of a plan for one call. `q_offset` is a multiple of 128; the plan's entries may be anything."""
    b, t, n, _ = q.shape
    s = k.shape[1]
    tiles = jnp.arange(num_query_tiles(t), dtype=jnp.int32)
    first = q_offset + tiles * QUERY_TILE  # position of each query tile, [i]
    limit = kv_limit(lengths, b, s)
    rows = jnp.clip(limit[:, None] - first, 0, QUERY_TILE)  # [b, i]
    rows = jnp.broadcast_to(rows[:, None], (b, n, tiles.size)).reshape(b * n, -1)  # [z, i]

    bands, band_tiles, cut = _bands(plan, b * n, first)
    blocks, block_tiles = _blocks(plan, b * n, first, bands, s)
    whole = band_tiles + block_tiles
    if plan.columns is None or plan.columns.shape[-1] == 0:
        keys = values = None
        column_tiles = jnp.zeros_like(whole)
        bias = None if bands is None else jnp.full((*whole.shape, KEY_TILE), -jnp.inf, jnp.bfloat16)
    else:
        keys, values, column_tiles, bias = _columns(plan, k, v, limit, first, bands, blocks, block_tiles)
    if bias is None:
        bias = jnp.asarray(_BIAS_OF_NONE)
    else:
        last = jnp.arange(2 * KEY_TILE, dtype=jnp.int32) < 2 * KEY_TILE - cut[..., None]  # of a cut tile, the keys held
        last = jnp.where(last, 0, -jnp.inf).astype(jnp.bfloat16)
        bias = jnp.concatenate([last, bias, jnp.full((*whole.shape, KEY_TILE), -jnp.inf, jnp.bfloat16)], -1)

    valid = rows > 0
    unbiased = whole - (cut > 0).astype(jnp.int32)
    work = [
        jnp.where(valid, 1 + unbiased // 2, 0),
        jnp.where(valid, 1 + (whole + column_tiles + 1) // 2, 0),
        band_tiles,
        whole,
        jnp.broadcast_to(first, whole.shape),
        rows,
        unbiased,
        whole + column_tiles,
    ]
    # Bands make neighbouring query tiles, which are taken side by side, read the same keys; and about as many of them.
    order = longest_first(work[STEPS]) if bands is None and blocks is not None else None
    last_values = None if lengths is None else _last_values(v, limit)
    return KernelTables(jnp.stack(work, -1), bands, blocks, keys, values, bias, last_values, order)


def _last_values(v: Float[Array, "b s k h"], limit: Int[Array, " b"]) -> Float[Array, "b 128 k h"]:
    """The values of the query tile that a sequence ends in, and 0 past its end."""
    rows = limit[:, None] // QUERY_TILE * QUERY_TILE + jnp.arange(QUERY_TILE, dtype=jnp.int32)
    batch = jnp.arange(v.shape[0], dtype=jnp.int32)[:, None]
    values = v.at[batch, jnp.minimum(rows, v.shape[1] - 1)].get(mode="promise_in_bounds")
    return jnp.where((rows < limit[:, None])[..., None, None], values, jnp.zeros((), v.dtype))


def _bands(
    plan: SparsePlan, z: int, first: Int[Array, " i"]
) -> tuple[Int[Array, "z R"] | None, Int[Array, "z i"], Int[Array, "z i"]]:
    """The distances without gaps (then `NO_BAND`), how many reach each query tile, and what key 0 cuts off the last.

    The tile at distance r of the query tile at q0 holds keys from q0 - r on: none if r >= q0 + 64, and all of them at
    or after key 0 only if r <= q0.
    """
    if plan.bands is None or plan.band_count is None or plan.bands.shape[-1] == 0:
        none = jnp.zeros((z, first.size), jnp.int32)
        return None, none, none
    count, blocks = plan.band_count.reshape(z), plan.block_count
    blocks = None if blocks is None else blocks.reshape(z, -1)
    bands = listed_bands(plan.bands.reshape(z, -1), count, blocks, multiple=plan.band_multiple, clean=plan.clean)
    counts = entries_before(bands, jnp.broadcast_to(rule.reach(first), (z, first.size)))
    cut = jnp.where(counts > 0, rule.band_cut(at_place(bands, counts - 1), first), 0)
    return bands, counts, cut


def _blocks(
    plan: SparsePlan, z: int, first: Int[Array, " i"], bands: Int[Array, "z R"] | None, kv_len: int
) -> tuple[Int[Array, "z i M"] | None, Int[Array, "z i"]]:
    """Block lists, ascending and without gaps up to the counts, and the counts."""
    if plan.blocks is None or plan.block_count is None or plan.blocks.shape[-1] == 0:
        return None, jnp.zeros((z, first.size), jnp.int32)
    blocks, count = plan.blocks.reshape(z, first.size, -1), plan.block_count.reshape(z, -1)
    if plan.clean:
        # Only those after the diagonal do not count, and they come last.
        return blocks, rule.past_in_order(blocks, count, first)
    q0 = first[:, None]
    keep = rule.past_blocks(blocks, count, q0, clean=False)
    if bands is not None:
        # In a head with blocks every band is a multiple of the tile: it covers a block whole or not at all.
        keep &= ~covered(band_bitmap(bands, kv_len + QUERY_TILE), q0 - blocks * KEY_TILE)
    return jnp.sort(jnp.where(keep, blocks, NO_BAND), axis=-1), keep.sum(-1, dtype=jnp.int32)


def _columns(
    plan: SparsePlan,
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    limit: Int[Array, " b"],
    first: Int[Array, " i"],
    bands: Int[Array, "z R"] | None,
    blocks: Int[Array, "z i M"] | None,
    block_tiles: Int[Array, "z i"],
) -> tuple[Float[Array, "z C h"], Float[Array, "z C h"], Int[Array, "z i"], BFloat16[Array, "z i W"]]:
    """Gathered keys and values, key tiles of columns that each query tile reads, and the bias of every column."""
    assert plan.columns is not None and plan.column_count is not None
    b, n, width = plan.columns.shape
    s, kv_heads, h = k.shape[1:]
    columns = plan.columns.reshape(b * n, width)
    if width % 8:  # the row tiling of swizzled TMA copies
        columns = jnp.pad(columns, ((0, 0), (0, -width % 8)), constant_values=-1)
        width = columns.shape[1]
    columns, ascending = rule.listed_columns(columns, plan.column_count.reshape(-1), s, clean=plan.clean)
    # No valid row sees what lies in the padding.
    columns = jnp.where(columns < jnp.repeat(limit, n, total_repeat_length=b * n)[:, None], columns, -1)

    end = jnp.broadcast_to(first, (b * n, first.size))
    if bands is not None:
        # Columns inside the unbroken window of bands before the diagonal are the last ones, and seen anyway.
        window = bands == KEY_TILE * jnp.arange(1, bands.shape[1] + 1, dtype=jnp.int32)
        end = end - KEY_TILE * window.sum(-1, keepdims=True, dtype=jnp.int32)
    column_tiles = (entries_before(ascending, end) + KEY_TILE - 1) // KEY_TILE

    bitmap = None if bands is None else band_bitmap(bands, s + QUERY_TILE)
    visible = rule.seen_columns(columns[:, None, :], first[:, None], bitmap)
    if blocks is not None:
        mixed = jnp.any((block_tiles.max(-1) > 0) & (plan.column_count.reshape(-1) > 0))
        # A lookup for every (query tile, column), too dear to make for heads that have only one of the two.
        tile = columns // KEY_TILE
        visible = lax.cond(mixed, lambda: visible & ~_in_blocks(blocks, block_tiles, tile), lambda: visible)

    index = jnp.maximum(columns, 0).reshape(b, kv_heads, n // kv_heads * width)
    batch = jnp.arange(b, dtype=jnp.int32)[:, None, None]
    head = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    keys, values = (x.at[batch, index, head].get(mode="promise_in_bounds").reshape(b * n, width, h) for x in (k, v))
    finite = jnp.isfinite(keys), jnp.isfinite(values)
    whole = (finite[0] & finite[1]).all(-1)[:, None]
    bias = jnp.where(visible, jnp.where(whole, 0, jnp.nan), -jnp.inf).astype(jnp.bfloat16)
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, -width % KEY_TILE)), constant_values=-jnp.inf)
    keys, values = (jnp.where(a, x, jnp.zeros((), x.dtype)) for a, x in zip(finite, (keys, values), strict=True))
    return keys, values, column_tiles, bias


def _in_blocks(blocks: Int[Array, "z i M"], count: Int[Array, "z i"], tile: Int[Array, "z C"]) -> Bool[Array, "z i C"]:
    """Whether the key tile of each column is in the block list of each query tile."""
    lists = jnp.where(jnp.arange(blocks.shape[-1], dtype=jnp.int32) < count[..., None], blocks, NO_BAND)
    lists = lists.reshape(-1, blocks.shape[-1])
    wanted = jnp.broadcast_to(tile[:, None], (*count.shape, tile.shape[-1])).reshape(lists.shape[0], -1)
    return (at_place(lists, entries_before(lists, wanted)) == wanted).reshape(*count.shape, -1)
