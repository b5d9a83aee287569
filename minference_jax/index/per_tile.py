"""The index of `VerticalSlash(probes=m)`: every m-th row is a probe, so that each query tile has its own estimate.

Prompts of some thousand tokens can afford that, and gain three things. Key tiles are chosen for each query tile instead
of bands for all of them. What a plan holds is known well enough to compare plans head by head. So no head needs to keep
less than the original's rule would: whatever is worth a visit is taken (a mean attention weight of at least the
threshold), and a head that would hold less than under the original's budget takes more, down to a threshold of its own.
Or the heads of a layer share a density, and the threshold is the one at which they visit that much.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minference_jax.index import probes, select
from minference_jax.index.vertical_slash import MIN_SLASHES, TILE_SINK_COLUMNS, column_words, slash_lines
from minference_jax.index.worth import Asked, Mass, held, within, worth_a_visit
from minference_jax.patterns import PatternArrays
from pallas_kernels.plan import KEY_TILE, QUERY_TILE, num_key_tiles, num_query_tiles
from pallas_kernels.plan_builders import slashes_to_bands

SPLITS = ((1.0, 1.0), (0.5, 1.35), (0.125, 1.45))
"""Factors of columns and slashes that visit about as much on text, where the columns are a quarter of the prompt. A
head keeps what the original's rule would at the best of these."""

SPARED, SPARED_OF_ALL = 0.9, 0.0005
"""A head may miss so much of what the original's rule would miss, less so much of all mass: its keys are chosen by the
probes that they are judged by, so that they seem to hold more than they do."""

OCTAVES, STEPS = 8.0, 7
"""A head's own threshold lies within a factor of 2⁸ below the common one, and is found to a sixteenth of an octave."""


class PerTileIndex(NamedTuple):
    """Parts of a SparsePlan: ascending positions and key-tile numbers with counts; axes `[b, n]` first."""

    columns: Int[Array, "b n s"]
    column_count: Int[Array, "b n"]
    blocks: Int[Array, "b n i kt"]
    block_count: Int[Array, "b n i"]


def per_tile_index(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    patterns: PatternArrays,
    *,
    lengths: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
) -> PerTileIndex:
    """Columns and blocks of every head, as if all heads were of this kind (`patterns`: budgets and thresholds, or
    densities, which count only for heads that have one).

    **Arguments:** as `vertical_slash_index`. The widths of the result are those of all keys: there is no budget.

    Cost: the scores of t / m rows with all keys, and some sixty (with densities eight) reads of `[t / 128, s]` sums in
    float32 a head. Memory: the scores of a few KV heads at a time (`probes.SCORE_BYTES`), with densities the sums of
    all heads; it grows with t · s.
    """
    b, t, n, _ = q.shape
    s, kv_heads, tiles = k.shape[1], k.shape[2], num_query_tiles(t)
    valid = jnp.clip(lengths - q_offset, 0, t)
    # A head that looks at the token before needs the tile before in the first row of a query tile alone, and the last
    # row of a prompt asks for what comes next. (Thresholds were measured with rows of the middle.)
    rows, share = tile_rows(valid, tiles, patterns.limits.every, ends=patterns.limits.density)
    everywhere = jnp.broadcast_to(rows.reshape(b, 1, -1), (b, n, rows.shape[1] * rows.shape[2]))
    budgets = {name: getattr(patterns, name) for name in ("first", "second", "threshold", "density")}
    budgets = probes.by_kv_head(budgets, b, n, kv_heads)
    per_head = probes.by_kv_head({"probes": probes.gather_probes(q, everywhere)}, b, n, kv_heads)
    per_sequence = {"rows": rows, "share": share, "valid": valid}
    last_key = (q_offset + valid)[:, None, None, None]

    def estimate(k: Array, per_head: dict[str, Array], sequence: dict[str, Array]) -> Mass:
        return _estimate(k, per_head["probes"], sequence, q_offset, scale)

    def packed(columns: Array, blocks: Array, last_key: Array) -> tuple[Array, Array]:
        key = jnp.arange(columns.shape[-1], dtype=jnp.int32)
        columns = (columns | (key < TILE_SINK_COLUMNS)) & (key < last_key)
        return select.pack(columns[..., :s]), select.pack(blocks)

    def at_thresholds(k: Array, per_head: dict[str, Array], sequence: dict[str, Array]) -> Any:
        mass = estimate(k, per_head, sequence)
        visible = (q_offset + sequence["valid"])[:, None, None]
        kept = _original(mass, k, per_head, visible, patterns.limits.floor, scale)
        total = sequence["valid"][:, None, None].astype(jnp.float32)
        missed = total - kept
        allowed = jnp.maximum(SPARED * missed - SPARED_OF_ALL * total, missed / 2)
        return packed(*_choose(mass, per_head["threshold"], total - allowed), visible[..., None])

    group = n // kv_heads
    size = group * s * (rows.shape[1] * rows.shape[2] * k.dtype.itemsize + 3 * tiles * 4)
    if patterns.limits.density:
        before, diagonal = probes.map_heads(
            lambda *some: estimate(*some)[:2], k, per_head, per_sequence, bytes_per_kv_head=size
        )
        mass = Mass(before, diagonal, *_query_tiles(valid, q_offset, tiles))
        asked = _asked(q, k, mass, budgets["first"], valid, q_offset, scale) if patterns.limits.question else None
        found = packed(*within(mass, budgets["density"], TILE_SINK_COLUMNS, asked), last_key)
    else:
        per_head |= budgets | _last_rows(q, kv_heads, valid, q_offset)
        found = probes.map_heads(at_thresholds, k, per_head, per_sequence, bytes_per_kv_head=size)
    column_bits, block_bits = (x.reshape(b, n, *x.shape[3:]) for x in found)
    columns, column_count = select.word_positions(column_bits, s, s)
    blocks, block_count = select.word_positions(block_bits, num_key_tiles(s), 0)
    return PerTileIndex(columns, column_count, blocks, block_count)


def _asked(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    mass: Mass,
    count: Int[Array, "b k g"],
    valid: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
) -> Asked:
    """The `count` keys that the last rows of each head attend to most, and of a head with any, all keys of the query
    tiles that hold these rows."""
    s, kv_heads = k.shape[1], k.shape[2]
    last = _last_rows(q, kv_heads, valid, q_offset) | {"count": count}

    def best(k: Array, heads: dict[str, Array], _: Any) -> Array:
        scores, factor = probes.probe_scores(heads["last"], k, scale)
        sums = probes.lazy_weights(scores, factor, heads["last_positions"]).by_key().sum(-2)
        return select.top_k_words(jnp.where(sums > 0, sums, -jnp.inf), heads["count"])

    size = q.shape[2] // kv_heads * probes.PROBES * s * k.dtype.itemsize
    columns = select.unpack(probes.map_heads(best, k, last, valid, bytes_per_kv_head=size), s)
    columns = jnp.pad(columns, [(0, 0)] * 3 + [(0, -s % KEY_TILE)])
    first = mass.start - q_offset
    end = (first + QUERY_TILE > valid[:, None] - probes.PROBES) & (first < valid[:, None])
    blocks = end[:, None, None, :, None] & mass.past() & (count > 0)[..., None, None]
    return Asked(columns, blocks)


def _last_rows(
    q: Float[Array, "b t n h"], kv_heads: int, valid: Int[Array, " b"], q_offset: Int[Array, ""]
) -> dict[str, Array]:
    """The last 64 valid rows, which the original looks at, `[b, k, g, 64, h]`, and their positions."""
    b, _, n, _ = q.shape
    rows = probes.probe_rows(valid, jnp.zeros((n,), bool))
    last = {"last": probes.gather_probes(q, rows), "last_positions": jnp.where(rows >= 0, rows + q_offset, -1)}
    return probes.by_kv_head(last, b, n, kv_heads)


def tile_rows(
    valid: Int[Array, " b"], tiles: int, every: int, *, ends: bool
) -> tuple[Int[Array, "b i p"], Float[Array, "b i p"]]:
    """The probe rows of each query tile and how many rows each stands for: 0 for one past the valid rows. Each is in
    the middle of its `every` rows; with `ends` the first of them, but the last probe of a tile, which may be its only
    one, is its last valid row.

    In the last tile of a sequence those that are valid share its rows, or if none is, its last row stands for all.
    """
    start = QUERY_TILE * jnp.arange(tiles, dtype=jnp.int32)[:, None]
    rows = start + every * jnp.arange(QUERY_TILE // every, dtype=jnp.int32) + (0 if ends else every // 2)
    valid = valid[:, None, None]
    end = jnp.minimum(start + QUERY_TILE, valid)  # [b, i, 1]
    inside = jnp.clip(end - start, 0)
    seen = (rows < valid) | ((rows == rows[:, :1]) & (inside > 0))
    share = jnp.where(seen, inside, 0) / jnp.maximum(seen.sum(-1, keepdims=True), 1)
    if ends:
        rows = jnp.where(rows + every >= end, end - 1, rows)
    return jnp.clip(jnp.minimum(rows, valid - 1), 0), share.astype(jnp.float32)


def _estimate(
    k: Float[Array, "b s k h"],
    rows: Float[Array, "b k g p h"],
    sequence: dict[str, Array],
    q_offset: Int[Array, ""],
    scale: float,
) -> Mass:
    b, tiles, per_tile = sequence["share"].shape
    scores, factor = probes.probe_scores(rows, k, scale)
    positions = jnp.where(sequence["share"] > 0, sequence["rows"] + q_offset, -1).reshape(b, 1, 1, -1)
    importance = jnp.broadcast_to(sequence["share"].reshape(b, 1, 1, -1), scores.shape[:-1])
    weights = probes.lazy_weights(scores, factor, jnp.broadcast_to(positions, scores.shape[:-1]), importance).by_key()
    held = weights.reshape(*scores.shape[:3], tiles, per_tile, -1).sum(-2)
    inside, start = _query_tiles(sequence["valid"], q_offset, tiles)
    before = jnp.where(jnp.arange(held.shape[-1], dtype=jnp.int32) < start[:, None], held, 0)
    diagonal = inside.sum(-1) - before.sum((-1, -2))
    before = jnp.pad(before, [(0, 0)] * 4 + [(0, -held.shape[-1] % KEY_TILE)])
    return Mass(before.reshape(*before.shape[:-1], -1, KEY_TILE), diagonal, inside, start)


def _query_tiles(
    valid: Int[Array, " b"], q_offset: Int[Array, ""], tiles: int
) -> tuple[Float[Array, "b 1 1 i"], Int[Array, " i"]]:
    """Valid rows of each query tile, and the position of its first row."""
    first = QUERY_TILE * jnp.arange(tiles, dtype=jnp.int32)
    inside = jnp.clip(valid[:, None] - first, 0, QUERY_TILE).astype(jnp.float32)
    return inside[:, None, None], q_offset + first


def _original(
    mass: Mass, k: Array, heads: dict[str, Array], visible: Int[Array, "b 1 1"], slashes: int, scale: float
) -> Float[Array, "b k g"]:
    """The most that the original's rule holds at one of the `SPLITS` of each head's budget."""
    s, shape = k.shape[1], heads["first"].shape
    scores, factor = probes.probe_scores(heads["last"], k, scale)
    weights = probes.lazy_weights(scores, factor, heads["last_positions"])
    by_key, by_distance = weights.by_key().sum(-2), weights.by_distance(0).sum(-2)
    before = mass.before.reshape(*mass.before.shape[:4], -1)[..., :s]
    back = mass.start[:, None] - jnp.arange(s, dtype=jnp.int32)  # the distance of a key before the query tile
    width = min(s, max(MIN_SLASHES, *(round(of_slashes * slashes) for _, of_slashes in SPLITS)))

    def keeps(split: Float[Array, 2]) -> Float[Array, "b k g"]:
        columns, lines = (
            jnp.round(split[i] * heads[name].astype(jnp.float32)).astype(jnp.int32)
            for i, name in enumerate(("first", "second"))
        )
        flags = select.unpack(column_words(by_key, columns, visible), s)
        lines, count = select.word_positions(slash_lines(by_distance, lines, visible), width, s)
        lines, count = lines.reshape(shape[0], -1, width), count.reshape(shape[0], -1)
        near = _covered(*slashes_to_bands(lines, count, max_distance=s - 1), s).reshape(*shape, 1, s + 1)
        index = jnp.broadcast_to(jnp.clip(back, 0).reshape(1, -1), (*shape, 1, back.size))
        banded = jnp.take_along_axis(near, index, axis=-1, mode="clip").reshape(*shape, *back.shape)
        return jnp.sum(jnp.where(banded | flags[..., None, :], before, 0), axis=(-1, -2))

    return jax.lax.map(keeps, jnp.asarray(SPLITS, jnp.float32)).max(0) + mass.diagonal


def _covered(bands: Int[Array, "b n R"], count: Int[Array, "b n"], s: int) -> Bool[Array, "b n s+1"]:
    """Whether the key at each distance 0 … s before a query tile lies in a band: [r − 63, r] for one at r."""
    at = jnp.where(jnp.arange(bands.shape[-1]) < count[..., None], bands, s + 2 * KEY_TILE)
    ends = jax.vmap(jax.vmap(lambda at: jnp.zeros((s + 2 * KEY_TILE,), jnp.int32).at[at].set(1, mode="drop")))(at)
    sums = jnp.cumsum(jnp.pad(ends, ((0, 0), (0, 0), (1, 0))), axis=-1)  # sums[x]: bands at less than x
    return sums[..., KEY_TILE : KEY_TILE + s + 1] > sums[..., : s + 1]


def _choose(
    mass: Mass, threshold: Float[Array, "b k g"], least: Float[Array, "b k g"]
) -> tuple[Bool[Array, "b k g x"], Bool[Array, "b k g i kt"]]:
    """Columns and blocks at the threshold, or at the largest of 2⁻ˣ of it that holds `least`."""

    def halve(step: Int[Array, ""], ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        octaves = jnp.where(step == 0, 0, (low + high) / 2)  # where the common threshold does, nothing else is tried
        enough = held(mass, *worth_a_visit(mass, threshold * jnp.exp2(-octaves))) >= least
        return jnp.where(enough, low, octaves), jnp.where(enough, octaves, high)

    none = jnp.zeros(least.shape, jnp.float32)
    _, octaves = jax.lax.fori_loop(0, STEPS + 1, halve, (none, jnp.full_like(none, OCTAVES)))
    return worth_a_visit(mass, threshold * jnp.exp2(-octaves))
