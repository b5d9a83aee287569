"""The index of `PerTile`: every m-th row is a probe, so that each query tile has its own estimate.

Prompts of some thousand tokens can afford so many probes, and gain two things:

- Key tiles are chosen for each query tile by itself, not as bands at one distance before all of them.
- The softmax mass that a plan holds is known well enough to compare plans, head by head.

The rule: whatever has a mean attention weight of at least the threshold is visited (`worth.py`). If a head then holds
less mass than the original's rule would hold with the floor's budget, its threshold is lowered until it does not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minference_jax.index import probes, select
from minference_jax.index.tile_mass import estimate, last_rows, tile_rows
from minference_jax.index.vertical_slash import MIN_SLASHES, TILE_SINK_COLUMNS, column_words, slash_lines
from minference_jax.index.weights import lazy_weights
from minference_jax.index.worth import Mass, held, worth_a_visit
from pallas_kernels.plan import KEY_TILE, SparsePlan, num_key_tiles, num_query_tiles
from pallas_kernels.plan_builders import slashes_to_bands
from pallas_kernels.tracing import vary_alike

SPLITS = ((1.0, 1.0), (0.5, 1.35), (0.125, 1.45))
"""Factors of (columns, slashes). On text, where the columns are a quarter of the prompt, the three visit about as many
cells. The floor of a head is what the original's rule holds at the best of them."""

SPARED, SPARED_OF_ALL = 0.9, 0.0005
"""The plan may miss at most 90 % of the mass that the original rule misses, minus 0.05 % of all mass. The margin
offsets a bias: the probes that choose the keys also judge them."""

OCTAVES, STEPS = 8.0, 7
"""A head's own threshold lies within a factor of 2⁸ below the common one, and is found to a sixteenth of an octave."""


def per_tile_index(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    budgets: dict[str, Array],
    *,
    every: int,
    floor: int,
    lengths: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
) -> SparsePlan:
    """Columns and blocks of every head.

    **Arguments:** `budgets`: arrays `[n]` or `[b, n]`: float32 `threshold`, and int32 `columns` and `slashes`, the
    original's budget that is the floor. `every` (static): rows to a probe, a divisor of 128. `floor` (static): the
    largest number of slashes. The rest as `vertical_slash_index`. The plan's widths are those of all keys.

    Cost: the scores of t / every rows with all keys, and some sixty reads of `[t / 128, s]` sums in float32 a head.
    Memory: the scores of a few KV heads at a time (`probes.SCORE_BYTES`); it grows with t · s.
    """
    b, t, n, _ = q.shape
    s, kv_heads, tiles = k.shape[1], k.shape[2], num_query_tiles(t)
    valid = jnp.clip(lengths - q_offset, 0, t)
    # Probes in the middle of their rows: thresholds were measured with these.
    rows, share = tile_rows(valid, tiles, every, ends=False)
    everywhere = jnp.broadcast_to(rows.reshape(b, 1, -1), (b, n, rows.shape[1] * rows.shape[2]))
    per_head = probes.by_kv_head({"probes": probes.gather_probes(q, everywhere)}, b, n, kv_heads)
    per_head |= probes.by_kv_head(budgets, b, n, kv_heads) | last_rows(q, kv_heads, valid, q_offset)
    per_sequence = {"rows": rows, "share": share, "valid": valid}

    def some_heads(k: Array, per_head: dict[str, Array], sequence: dict[str, Array]) -> Any:
        mass = estimate(k, per_head["probes"], sequence, q_offset, scale)
        visible = (q_offset + sequence["valid"])[:, None, None]
        kept = _original(mass, k, per_head, visible, floor, scale)
        total = sequence["valid"][:, None, None].astype(jnp.float32)
        missed = total - kept
        allowed = jnp.maximum(SPARED * missed - SPARED_OF_ALL * total, missed / 2)
        return packed(*_choose(mass, per_head["threshold"], total - allowed), visible[..., None], s)

    size = n // kv_heads * s * (rows.shape[1] * rows.shape[2] * k.dtype.itemsize + 3 * tiles * 4)
    found = probes.map_heads(some_heads, k, per_head, per_sequence, bytes_per_kv_head=size)
    columns, blocks = (x.reshape(b, n, *x.shape[3:]) for x in found)
    return unpacked(columns, blocks, s)


def packed(
    columns: Bool[Array, "b k g x"], blocks: Bool[Array, "b k g i kt"], last_key: Int[Array, "b 1 1 1"], s: int
) -> tuple[Array, Array]:
    """Bitmaps of the columns that a sequence has, the attention sink among them, and of the blocks."""
    key = jnp.arange(columns.shape[-1], dtype=jnp.int32)
    columns = (columns | (key < TILE_SINK_COLUMNS)) & (key < last_key)
    return select.pack(columns[..., :s]), select.pack(blocks)


def unpacked(column_bits: Array, block_bits: Array, s: int) -> SparsePlan:
    """The plan of such bitmaps, `[b, n, …]`."""
    columns, column_count = select.word_positions(column_bits, s, s)
    blocks, block_count = select.word_positions(block_bits, num_key_tiles(s), 0)
    return SparsePlan(columns, column_count, None, None, blocks, block_count, band_multiple=KEY_TILE, clean=True)


def _original(
    mass: Mass, k: Array, heads: dict[str, Array], visible: Int[Array, "b 1 1"], slashes: int, scale: float
) -> Float[Array, "b k g"]:
    """The most that the original's rule holds at one of the `SPLITS` of each head's budget."""
    s, shape = k.shape[1], heads["columns"].shape
    scores, factor = probes.probe_scores(heads["last"], k, scale)
    weights = lazy_weights(scores, factor, heads["last_positions"])
    by_key, by_distance = weights.sum_by_key(), weights.sum_by_distance(0)
    before = mass.before.reshape(*mass.before.shape[:4], -1)[..., :s]
    back = mass.start[:, None] - jnp.arange(s, dtype=jnp.int32)  # the distance of a key before the query tile
    width = min(s, max(MIN_SLASHES, *(round(of_slashes * slashes) for _, of_slashes in SPLITS)))

    def keeps(split: Float[Array, 2]) -> Float[Array, "b k g"]:
        columns, lines = (
            jnp.round(split[i] * heads[name].astype(jnp.float32)).astype(jnp.int32)
            for i, name in enumerate(("columns", "slashes"))
        )
        flags = select.unpack(column_words(by_key, columns, visible), s)
        lines, count = select.word_positions(slash_lines(by_distance, lines, visible), width, s)
        lines, count = lines.reshape(shape[0], -1, width), count.reshape(shape[0], -1)
        near = _covered(*slashes_to_bands(lines, count, max_distance=s - 1), s).reshape(*shape, 1, s + 1)
        index = jnp.broadcast_to(jnp.clip(back, 0).reshape(1, -1), (*shape, 1, back.size))
        banded = jnp.take_along_axis(near, index, axis=-1, mode="clip").reshape(*shape, *back.shape)
        return jnp.sum(jnp.where(banded | flags[..., None, :], before, 0), axis=(-1, -2))

    return jax.lax.map(keeps, jnp.asarray(SPLITS, jnp.float32)).max(0) + mass.diagonal


def _covered(bands: Int[Array, "b n R"], count: Int[Array, "b n"], s: int) -> Bool[Array, "b n {s}+1"]:
    """Whether the key at each distance 0 … s before a query tile lies in a band: [r − 63, r] for one at r."""
    at = jnp.where(jnp.arange(bands.shape[-1]) < count[..., None], bands, s + 2 * KEY_TILE)
    ends = jax.vmap(jax.vmap(lambda at: jnp.zeros((s + 2 * KEY_TILE,), jnp.int32).at[at].set(1, mode="drop")))(at)
    sums = jnp.cumsum(jnp.pad(ends, ((0, 0), (0, 0), (1, 0))), axis=-1)  # sums[x]: bands at less than x
    return sums[..., KEY_TILE : KEY_TILE + s + 1] > sums[..., : s + 1]


def _choose(
    mass: Mass, threshold: Float[Array, "b k g"], least: Float[Array, "b k g"]
) -> tuple[Bool[Array, "b k g x"], Bool[Array, "b k g i kt"]]:
    """Columns and blocks at the threshold if they hold the mass `least`; else at the highest lower one that does.

    Lower ones are threshold · 2⁻ˣ with x up to `OCTAVES`, found by bisection.
    """

    def halve(step: Int[Array, ""], ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        octaves = jnp.where(step == 0, 0, (low + high) / 2)  # where the common threshold does, nothing else is tried
        enough = held(mass, *worth_a_visit(mass, threshold * jnp.exp2(-octaves))) >= least
        return jnp.where(enough, low, octaves), jnp.where(enough, octaves, high)

    none = jnp.zeros(least.shape, jnp.float32)
    ends = vary_alike((none, jnp.full_like(none, OCTAVES)), mass, threshold, least)
    _, octaves = jax.lax.fori_loop(0, STEPS + 1, halve, ends)
    return worth_a_visit(mass, threshold * jnp.exp2(-octaves))
