"""SparsePlans of the three patterns: A-shape, vertical-slash, block-sparse."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.bands import entries_before
from pallas_kernels.checks import check_whole
from pallas_kernels.plan import SparsePlan
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE, num_key_tiles

_PAST_THE_END = jnp.iinfo(jnp.int32).max  # sorts after every key


def compact(flags: Bool[Array, "*lead w"], width: int) -> tuple[Int[Array, "*lead width"], Int[Array, "*lead"]]:
    """Positions of the set flags, ascending, in the first `count` of `width` slots (the rest hold 0), and the count.

    Set flags beyond the first `width` are dropped.
    """
    slot = jnp.cumsum(flags, axis=-1, dtype=jnp.int32) - 1
    slot = jnp.where(flags, slot, width).reshape(-1, flags.shape[-1])
    position = jnp.broadcast_to(jnp.arange(flags.shape[-1], dtype=jnp.int32), slot.shape)
    row = jnp.arange(slot.shape[0])[:, None]
    lists = jnp.zeros((slot.shape[0], width), jnp.int32).at[row, slot].set(position, mode="drop")
    return lists.reshape(*flags.shape[:-1], width), jnp.minimum(flags.sum(-1, dtype=jnp.int32), width)


def a_shape_plan(b: int, n: int, *, sink: int, window: int) -> SparsePlan:
    """The first `sink` keys and the last `window` keys of every query, for `b` sequences of `n` heads.

    **Arguments** (all static): `sink` >= 0 keys from position 0; `window` >= 0 keys back from the query, itself
    included. The window is rounded out to key tiles.

    Source: MInference (arXiv 2407.02490) §3.2, A-shape; the official `streaming_forward(n_init, n_local)`.
    """
    for name, value in (("sink", sink), ("window", window)):
        check_whole(name, value, 0)
    # The oldest key of a tile's window is q0 - window + 1.
    widest = -(-max(window - 1, 0) // KEY_TILE)
    bands = KEY_TILE * jnp.arange(1, widest + 1, dtype=jnp.int32)
    columns = jnp.arange(sink, dtype=jnp.int32)

    def part(values: Int[Array, " w"]) -> tuple[Int[Array, "b n w"] | None, Int[Array, "b n"] | None]:
        if values.size == 0:
            return None, None
        return jnp.broadcast_to(values, (b, n, values.size)), jnp.full((b, n), values.size, jnp.int32)

    return SparsePlan(*part(columns), *part(bands), band_multiple=KEY_TILE, clean=True)


def full_plan(b: int, n: int, kv_len: int) -> SparsePlan:
    """The plan that visits every causal key: a band at every distance."""
    bands = KEY_TILE * jnp.arange(1, num_key_tiles(kv_len) + 1, dtype=jnp.int32)
    return SparsePlan(
        bands=jnp.broadcast_to(bands, (b, n, bands.size)),
        band_count=jnp.full((b, n), bands.size, jnp.int32),
        band_multiple=KEY_TILE,
        clean=True,
    )


def slashes_to_bands(
    slashes: Int[Array, "b n S"],
    slash_count: Int[Array, "b n"] | None = None,
    *,
    max_distance: int,
    width: int | None = None,
) -> tuple[Int[Array, "b n R"], Int[Array, "b n"]]:
    """Band tiles that cover slash lines (a line: all pairs of one query-key distance).

    A line at distance d shows the 128 rows of a query tile at q0 the keys q0 - d ... q0 - d + 127. Lines whose keys
    touch, or leave a gap of less than a tile, form a run, which is covered by tiles laid end to end from its near end.

    **Arguments:** `slashes`: int32 distances in any order, repeats allowed; negative ones and those past
    `max_distance` are ignored, as are entries at or past `slash_count`. `max_distance` (static): the largest distance
    of interest, usually kv_len - 1. `width` (static): width R of the result; by default wide enough for every band.
    When there are more bands than `width`, the nearest are kept.

    **Returns:** int32 ascending distances of at least 64 (the diagonal needs no naming), and their count.

    Source: the official `convert_vertical_slash_indexes` merges lines into ranges for each 64-query tile; its tiles
    keep their distances from one query tile to the next, so a list per head says the same.
    """
    if slashes.ndim != 3 or slashes.dtype != jnp.int32:
        raise ValueError(f"slashes must be int32 [b, n, S], got {slashes.dtype} {slashes.shape}")
    if slashes.shape[-1] == 0:
        slashes = jnp.full((*slashes.shape[:2], 1), -1, jnp.int32)
    if width is None:
        width = max(1, min(3 * slashes.shape[-1], num_key_tiles(max_distance + 1)))
    shape, lines = slashes.shape[:2], slashes.shape[-1]
    valid = (slashes >= 0) & (slashes <= max_distance)
    if slash_count is not None:
        valid = valid & (jnp.arange(lines) < slash_count[..., None])
    # Distance 0 needs no tile, so it stands for the entries that are ignored.
    line = jnp.sort(jnp.where(valid, slashes, 0).reshape(-1, lines), axis=-1)
    # A line's rows see a key that lies `x` before q0 if line - 127 <= x <= line; up to x = 0 it is in the diagonal.
    near = jnp.maximum(line - (QUERY_TILE - 1), 1)
    before = jnp.pad(line[:, :-1], ((0, 0), (1, 0)))
    starts = (before == 0) | (near - before > KEY_TILE)
    # Tiles of a run up to each of its lines; the last line of a run counts for it.
    run_start = lax.cummax(jnp.where(starts, near, 0), axis=1)
    tiles = (line - run_start + KEY_TILE) // KEY_TILE
    ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    total = jnp.cumsum(jnp.where(ends, tiles, 0), axis=1)
    nth = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (line.shape[0], width))
    run = entries_before(total, nth + 1)  # the run that the nth tile belongs to, by the place of its last line
    of_run = partial(jnp.take_along_axis, indices=jnp.minimum(run, lines - 1), axis=1, mode="clip")
    first = of_run(total) - of_run(tiles)  # tiles before the run
    bands = of_run(run_start) + KEY_TILE * (nth - first) + KEY_TILE - 1
    count = jnp.minimum(total[:, -1], width)
    bands = jnp.where(nth < count[:, None], bands, 0)
    return bands.reshape(*shape, width), count.reshape(shape)


def vertical_slash_plan(
    columns: Int[Array, "b n C"],
    slashes: Int[Array, "b n S"],
    *,
    kv_len: int,
    column_count: Int[Array, "b n"] | None = None,
    slash_count: Int[Array, "b n"] | None = None,
) -> SparsePlan:
    """Key columns and slash lines, per head.

    **Arguments:** `columns`: int32 key positions in any order; `slashes`: int32 query-key distances in any order.
    Entries that are negative, at or past `kv_len`, repeated, or at or past their count are ignored.

    The plan covers at least these columns and lines: lines are rounded out to tiles (`slashes_to_bands`), columns are
    exact.

    Source: MInference (arXiv 2407.02490) §3.2, Algorithms 2 and 4; the official `convert_vertical_slash_indexes`.
    """
    columns, count = _ascending(columns, column_count, kv_len, "columns")
    bands, band_count = slashes_to_bands(slashes, slash_count, max_distance=kv_len - 1)
    return SparsePlan(columns, count, bands, band_count, clean=True)


def block_sparse_plan(blocks: Int[Array, "b n i M"]) -> SparsePlan:
    """Key tiles per query tile.

    **Arguments:** `blocks`: int32 key-tile numbers (key position // 64) for each tile of 128 queries, in any order;
    negative entries (by custom -1), tiles after the diagonal and repeats are ignored. The diagonal is always visited.

    Source: MInference (arXiv 2407.02490) §3.2, Algorithm 3; the official `block_sparse_attention` uses 64-query rows.
    """
    blocks, count = _ascending(blocks, None, _PAST_THE_END, "blocks")
    return SparsePlan(blocks=blocks, block_count=count, clean=True)


def _ascending(values: Array, count: Array | None, end: int, name: str) -> tuple[Array, Array]:
    """Valid entries (0 <= entry < end, before the count), each once, sorted to the front, and their number."""
    if values.dtype != jnp.int32 or values.ndim != (4 if name == "blocks" else 3):
        wanted = "[b, n, i, M]" if name == "blocks" else "[b, n, C]"
        raise ValueError(f"{name} must be int32 {wanted}, got {values.dtype} {values.shape}")
    valid = (values >= 0) & (values < end)
    if count is not None:
        valid = valid & (jnp.arange(values.shape[-1]) < count[..., None])
    values = jnp.sort(jnp.where(valid, values, _PAST_THE_END), axis=-1)
    repeat = values == jnp.pad(values[..., :-1], [(0, 0)] * (values.ndim - 1) + [(1, 0)], constant_values=-1)
    values = jnp.sort(jnp.where(repeat, _PAST_THE_END, values), axis=-1)
    return values, (values < _PAST_THE_END).sum(-1, dtype=jnp.int32)
