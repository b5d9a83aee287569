"""What the Hopper kernel reads of a plan, prepared in plain jnp.

The kernel wants lists without gaps or repeats, and columns whose keys lie side by side in memory. This module makes
them from any `SparsePlan` in a few fused passes, at any length: nothing here is as large as queries times keys.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Int

from pallas_kernels.plan import KEY_TILE, QUERY_TILE, SparsePlan, kv_limit, num_key_tiles, num_query_tiles

# Fields of one query tile's row of `KernelTables.work`.
STEPS_NO_BIAS = 0  # the diagonal step and the steps of two whole key tiles end here
STEPS = 1  # all steps; 0 for a query tile without a valid row
BANDS = 2  # band tiles that lie at or after key 0
TILES = 3  # band tiles and block tiles
DIAGONAL = 4  # number of the key tile where the query tile starts
ROWS_VALID = 5  # rows before the sequence's length
WORK_FIELDS = 8  # padded to a power of two


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["work", "bands", "blocks", "keys", "values", "bias"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class KernelTables:
    """The plan as the kernel reads it; `z` = b·n, heads of all sequences, `i` query tiles.

    - `work`: int32 `[z, i, 8]`, the counts of each query tile (fields above).
    - `bands`: int32 `[z, R]`, distances in key tiles, ascending, without gaps or repeats (R = 1 without bands).
    - `blocks`: int32 `[z, i, M]`, key tiles; -1 where the kernel skips (repeats, tiles of a band, out of range). None
      without blocks.
    - `keys`, `values`: `[z, C, h]`, the keys and values of the columns, gathered. None without columns.
    - `bias`: bf16 `[z, i, 64 + C' + 64]` with C' = C rounded up to 64: 64 zeros, then 0 or -inf for each column (-inf
      where the query tile sees that key elsewhere, or not at all), then -inf. A step that pairs the last whole tile
      with the first columns starts in the zeros; a step whose second half is missing ends in the -inf.
    """

    work: Int[Array, "z i 8"]
    bands: Int[Array, "z R"]
    blocks: Int[Array, "z i M"] | None
    keys: Float[Array, "z C h"] | None
    values: Float[Array, "z C h"] | None
    bias: BFloat16[Array, "z i W"]


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
    first = q_offset // KEY_TILE + tiles * (QUERY_TILE // KEY_TILE)  # key tile of the diagonal, [i]
    limit = kv_limit(lengths, b, s)
    rows = jnp.clip(limit[:, None] - q_offset - tiles * QUERY_TILE, 0, QUERY_TILE)  # [b, i]
    rows = jnp.repeat(rows, n, axis=0, total_repeat_length=b * n)  # [z, i]

    flags, bands, band_tiles = _bands(plan, b * n, first, num_key_tiles(s))
    blocks, block_tiles, ascending = _blocks(plan, b * n, first, flags)
    whole = band_tiles + block_tiles
    if plan.columns is None or plan.columns.shape[-1] == 0:
        keys = values = None
        column_tiles = jnp.zeros_like(whole)
        bias = jnp.concatenate([jnp.zeros(KEY_TILE), jnp.full(KEY_TILE, -jnp.inf)]).astype(jnp.bfloat16)
        bias = jnp.broadcast_to(bias, (1, 1, 2 * KEY_TILE))
    else:
        keys, values, column_tiles, bias = _columns(plan, k, v, first, flags, ascending)

    valid = rows > 0
    work = [
        jnp.where(valid, 1 + whole // 2, 0),
        jnp.where(valid, 1 + (whole + column_tiles + 1) // 2, 0),
        band_tiles,
        whole,
        jnp.broadcast_to(first, whole.shape),
        rows,
        jnp.zeros_like(whole),
        jnp.zeros_like(whole),
    ]
    return KernelTables(jnp.stack(work, -1), bands, blocks, keys, values, bias)


def _bands(
    plan: SparsePlan, z: int, first: Int[Array, " i"], key_tiles: int
) -> tuple[Bool[Array, "z D"] | None, Int[Array, "z R"], Int[Array, "z i"]]:
    """Which distances each head visits, the same as a list without gaps, and how many reach each query tile."""
    if plan.bands is None or plan.band_count is None or plan.bands.shape[-1] == 0:
        return None, jnp.zeros((z, 1), jnp.int32), jnp.zeros((z, first.size), jnp.int32)
    width = plan.bands.shape[-1]
    bands = plan.bands.reshape(z, width)
    distance = bands // KEY_TILE
    listed = jnp.arange(width, dtype=jnp.int32) < plan.band_count.reshape(z, 1)
    valid = listed & (bands % KEY_TILE == 0) & (distance > 0)
    size = key_tiles + 1  # distances 0 .. key_tiles
    target = jnp.where(valid, distance, size)
    # Integers, not booleans: an atomic maximum on int32 needs no compare-and-swap loop.
    flags = jnp.zeros((z, size), jnp.int32).at[jnp.arange(z, dtype=jnp.int32)[:, None], target].max(1, mode="drop")
    reached = jnp.cumsum(flags, axis=-1)
    counts = reached[:, jnp.clip(first, 0, size - 1)]
    nth = jnp.arange(1, width + 1, dtype=jnp.int32)
    compact = jax.vmap(lambda r: jnp.searchsorted(r, nth, method="scan_unrolled"))(reached)
    return flags > 0, compact.astype(jnp.int32), counts


def _blocks(
    plan: SparsePlan, z: int, first: Int[Array, " i"], flags: Bool[Array, "z D"] | None
) -> tuple[Int[Array, "z i M"] | None, Int[Array, "z i"], Int[Array, "z i M"] | None]:
    """Block lists with -1 for what the kernel skips, their counts, and the lists with gaps filled (ascending)."""
    if plan.blocks is None or plan.block_count is None or plan.blocks.shape[-1] == 0:
        return None, jnp.zeros((z, first.size), jnp.int32), None
    blocks = plan.blocks.reshape(z, first.size, -1)
    listed = jnp.arange(blocks.shape[-1], dtype=jnp.int32) < plan.block_count.reshape(z, first.size, 1)
    blocks = jnp.where(listed & (blocks < first[:, None]), jnp.maximum(blocks, -1), -1)
    ascending = lax.cummax(blocks, axis=2)
    earlier = jnp.pad(ascending[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-1)
    keep = blocks > earlier
    if flags is not None:
        keep &= ~_lookup(flags, first[:, None] - blocks)
    return jnp.where(keep, blocks, -1), keep.sum(-1, dtype=jnp.int32), ascending


def _columns(
    plan: SparsePlan,
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    first: Int[Array, " i"],
    flags: Bool[Array, "z D"] | None,
    blocks: Int[Array, "z i M"] | None,
) -> tuple[Float[Array, "z C h"], Float[Array, "z C h"], Int[Array, "z i"], BFloat16[Array, "z i W"]]:
    """Gathered keys and values, key tiles of columns that each query tile reads, and the bias of every column."""
    assert plan.columns is not None and plan.column_count is not None
    b, n, width = plan.columns.shape
    s, kv_heads, h = k.shape[1:]
    columns = plan.columns.reshape(b * n, width)
    if width % 8:  # the row tiling of swizzled TMA copies
        columns = jnp.pad(columns, ((0, 0), (0, -width % 8)), constant_values=-1)
        width = columns.shape[1]
    listed = jnp.arange(width, dtype=jnp.int32) < plan.column_count.reshape(b * n, 1)
    columns = jnp.where(listed & (columns < s), jnp.maximum(columns, -1), -1)
    ascending = lax.cummax(columns, axis=1)
    keep = columns > jnp.pad(ascending[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    q0 = first * KEY_TILE
    end = jnp.broadcast_to(q0, (b * n, q0.size))
    if flags is not None:
        # Columns inside the unbroken window of bands before the diagonal are the last ones, and seen anyway.
        window = jnp.cumprod(flags[:, 1:].astype(jnp.int32), axis=1).sum(1, dtype=jnp.int32)
        end = end - KEY_TILE * window[:, None]
    reached = jax.vmap(partial(jnp.searchsorted, method="scan_unrolled"))(ascending, end).astype(jnp.int32)
    column_tiles = (reached + KEY_TILE - 1) // KEY_TILE

    visible = keep[:, None, :] & (columns[:, None, :] < q0[:, None])
    tile = columns // KEY_TILE
    if flags is not None:
        visible &= ~_lookup(flags, first[:, None] - tile[:, None, :])
    if blocks is not None and plan.block_count is not None:
        mixed = jnp.any((plan.block_count.reshape(b * n, -1).max(-1) > 0) & (plan.column_count.reshape(-1) > 0))
        # A lookup for every (query tile, column), too dear to make for heads that have only one of the two.
        visible = lax.cond(mixed, lambda: visible & ~_in_blocks(blocks, tile), lambda: visible)
    bias = jnp.where(visible, 0, -jnp.inf).astype(jnp.bfloat16)
    right = -width % KEY_TILE + KEY_TILE
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, right)), constant_values=-jnp.inf)
    bias = jnp.pad(bias, ((0, 0), (0, 0), (KEY_TILE, 0)))

    index = jnp.maximum(columns, 0).reshape(b, kv_heads, n // kv_heads * width)
    batch = jnp.arange(b, dtype=jnp.int32)[:, None, None]
    head = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    keys, values = (x.at[batch, index, head].get(mode="promise_in_bounds").reshape(b * n, width, h) for x in (k, v))
    return keys, values, column_tiles, bias


def _lookup(flags: Bool[Array, "z D"], distance: Int[Array, "z i m"]) -> Bool[Array, "z i m"]:
    """flags[z, distance[z, i, m]]; False outside the table."""
    inside = (distance >= 0) & (distance < flags.shape[-1])
    index = jnp.clip(distance, 0, flags.shape[-1] - 1)
    head = jnp.arange(flags.shape[0], dtype=jnp.int32)[:, None, None]
    return inside & flags.at[head, index].get(mode="promise_in_bounds")


def _in_blocks(blocks: Int[Array, "z i M"], tile: Int[Array, "z C"]) -> Bool[Array, "z i C"]:
    """Whether the key tile of each column is in the (ascending, gap-filled) block list of each query tile."""

    def row(listed: Int[Array, " M"], wanted: Int[Array, " C"]) -> Bool[Array, " C"]:
        at = jnp.searchsorted(listed, wanted, method="scan_unrolled")
        return listed[jnp.minimum(at, listed.shape[0] - 1)] == wanted

    return jax.vmap(jax.vmap(row, in_axes=(0, None)))(blocks, tile)
