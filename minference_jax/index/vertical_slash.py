"""The vertical-slash index: key columns and band tiles for each head, from the attention of a few probe rows.

There are two rules.

- *Slashes counted in lines* (`tiles=None`) is the original's rule. The probes' softmax weights are summed by key and by
  distance. The keys and the distances with the largest sums are taken; the first 30 keys and the distances 0 … 99 are
  taken in any case.
- *Slashes counted in tiles* is ours. First the bands that capture the most mass are taken. Then columns are taken by
  the mass that the bands leave uncovered; with probes="last", by all of their mass.

With a threshold, heads differ in how much they take. A column or a band is taken if the mean attention weight of its
keys reaches the threshold. Keys that are columns for sure (`sure_columns`) do not count when bands are judged.

Source: MInference (arXiv 2407.02490) §3.2, Algorithm 2; the constants are those of its released code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from minference_jax.index import probes, select, tiles
from minference_jax.index.weights import Weights, lazy_weights
from pallas_kernels.plan import KEY_TILE, QUERY_TILE, SparsePlan, num_key_tiles
from pallas_kernels.plan_builders import slashes_to_bands

SINK_COLUMNS, WINDOW_DISTANCES = 30, 100
"""Columns and distances that the original always takes."""

MIN_COLUMNS, MIN_SLASHES = 30, 50
"""The original's smallest budgets."""

TILE_SINK_COLUMNS = 4
"""Columns always taken when slashes are counted in tiles: the attention sink."""

GROWTH = 8
"""How many times its budget a head with a threshold may take: it decides static widths."""

SURE_COLUMN = 3.0
"""A key is a column for sure if its mean weight is so many times the weight that is worth a visit. That weight is the
threshold, or half of the mean over all keys where there is no threshold. No probe counts for more than its share of
it, so at least three probes must agree.

Why: spread probes see one column at as many distances as there are probes. Without this rule each of these distances
would pass for a band, and the bands together would leave nothing of the column. (Measured on text with a threshold, at
equal density: a value of 1 keeps 0.3 points less recall, no such rule 2 points less.)"""


class Widths(NamedTuple):
    """What occurs in any head of a model, static: upper bounds that decide shapes, and which estimates are compiled.

    A width is 0 where no head uses that budget. `lines`: some heads count slashes as lines. `spread`, `coverage`,
    `threshold`: some heads have spread probes, a coverage, a threshold.
    """

    columns: int
    slashes: int = 0
    tiles: int = 0
    lines: bool = False
    spread: bool = False
    coverage: bool = False
    threshold: bool = False


def vertical_slash_index(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    budgets: dict[str, Array],
    widths: Widths,
    *,
    lengths: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
) -> SparsePlan:
    """Columns and bands of every head.

    **Arguments:** `budgets`: arrays `[n]` or `[b, n]`: int32 `columns`, `slashes` and `tiles` (−1 where slashes are
    counted as lines), bool `spread`, float32 `coverage` and `threshold` (inf for none). `lengths`: int32 `[b]` in
    [0, s]. `q_offset`: position of the first query row. Only keys that the last valid query of each sequence can see
    take part, so padding and a longer cache change nothing.

    Memory: the scores of a few KV heads at a time (`probes.SCORE_BYTES`). Cost: one product of 64 rows a head with
    all keys, and a few reads of its result.
    """
    b, t, n, _ = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    valid = jnp.clip(lengths - q_offset, 0, t)
    rows = probes.probe_rows(valid, budgets["spread"])
    per_head = {
        "probes": probes.gather_probes(q, rows),
        "positions": jnp.where(rows >= 0, rows + q_offset, -1),
        "importance": probes.probe_importance(rows, budgets["spread"]),
    }
    per_head = probes.by_kv_head(per_head | budgets, b, n, kv_heads)

    def some_heads(k: Array, per_head: dict[str, Array], valid: Array) -> Any:
        scores, factor = probes.probe_scores(per_head["probes"], k, scale)
        weights = lazy_weights(scores, factor, per_head["positions"], per_head["importance"])
        return _select(weights, per_head, Rows(q_offset, valid[:, None, None]), widths)

    size = n // kv_heads * probes.PROBES * s * k.dtype.itemsize
    bitmaps = probes.map_heads(some_heads, k, per_head, valid, bytes_per_kv_head=size)
    column_words, line_words, band_words = (x.reshape(b, n, -1) for x in bitmaps)
    columns, column_count = select.word_positions(column_words, column_width(widths, s), s)
    bands, band_count = _bands(line_words, band_words, budgets["tiles"], widths, s)
    multiple = 1 if widths.lines else KEY_TILE  # only lines are covered by tiles that start anywhere
    return SparsePlan(columns, column_count, bands, band_count, band_multiple=multiple, clean=True)


class Rows(NamedTuple):
    """The query rows that a plan is for: `valid` of them, from position `start`."""

    start: Int[Array, ""]
    valid: Int[Array, "*sequences"]

    def share_past(self, position: Int[Array, " x"]) -> Float[Array, "*sequences x"]:
        """Share of the rows that lie at or past each position: those that can see a key there. At least one tile's."""
        valid = jnp.maximum(self.valid, QUERY_TILE)[..., None].astype(jnp.float32)
        past = (self.start + self.valid)[..., None] - jnp.maximum(position, self.start)
        return jnp.clip(past.astype(jnp.float32), QUERY_TILE, valid) / valid


def _select(
    weights: Weights, heads: dict[str, Array], rows: Rows, widths: Widths
) -> tuple[UInt32[Array, "b k g w"], UInt32[Array, "b k g l"], UInt32[Array, "b k g r"]]:
    """Bitmaps of columns, of line distances and of bands (by number); one that no head needs has no words."""
    visible, mass = rows.start + rows.valid, heads["importance"].sum(-1)
    target = heads["coverage"] * mass if widths.coverage else None
    none = jnp.zeros((*mass.shape, 0), jnp.uint32)
    columns, lines, bands = [], none, none
    if widths.lines:
        lines = slash_lines(weights.sum_by_distance(0), heads["slashes"], visible, target)
        columns.append(column_words(weights.sum_by_key(), heads["columns"], visible, target))
    if widths.tiles or not widths.lines:
        sure, others = None, None
        if widths.threshold:
            sure = sure_columns(weights.by_key(), heads, rows)
            others = (sure == 0) | jnp.isinf(heads["threshold"])[..., None]
        # The sink belongs to the columns; at the probes' distances it would pass for a band.
        captured = tiles.band_scores(weights.sum_by_distance(KEY_TILE, others))
        scores, budget = captured, heads["tiles"]
        if widths.threshold:
            distance = KEY_TILE * jnp.arange(captured.shape[-1], dtype=jnp.int32)
            mean = captured / (KEY_TILE * mass[..., None] * rows.share_past(distance))
            scores, budget = widened(captured, budget, mean, heads["threshold"])
        flags = best_bands(scores, budget, visible, captured, target)
        # Under the last rows alone a column looks like a band, and what the bands leave says nothing about it.
        if widths.spread:
            rest = uncovered(weights.by_key(), heads["positions"], flags, heads["spread"])
        else:
            rest = weights.sum_by_key()
        if widths.spread and sure is None:
            sure = sure_columns(weights.by_key(), heads, rows)
        # The barrier keeps this sum of sums from becoming a pass of its own over the weights.
        left = None if target is None else target - (mass - jax.lax.optimization_barrier(rest).sum(-1))
        scores, budget = rest if sure is None else jnp.maximum(rest, sure), heads["columns"]
        if widths.threshold:
            mean = scores / (mass[..., None] * rows.share_past(jnp.arange(rest.shape[-1], dtype=jnp.int32)))
            scores, budget = widened(scores, budget, mean, heads["threshold"])
        columns.append(uncovered_words(scores, budget, visible, rest, left))
        bands = select.pack(flags)
    words = columns[0] if len(columns) == 1 else jnp.where((heads["tiles"] < 0)[..., None], *columns)
    return words, lines, bands


def _bands(
    line_words: UInt32[Array, "b n l"],
    band_words: UInt32[Array, "b n r"],
    tiles: Int[Array, "*b n"],
    widths: Widths,
    s: int,
) -> tuple[Int[Array, "b n R"], Int[Array, "b n"]]:
    """Ascending distances of the bands that were chosen or that cover the lines, and their count."""
    found = []
    if line_words.shape[-1]:
        slashes, count = select.word_positions(line_words, min(s, max(widths.slashes, MIN_SLASHES)), s)
        found.append(slashes_to_bands(slashes, count, max_distance=s - 1))
    if band_words.shape[-1]:
        numbers, count = select.word_positions(band_words, max(1, min(num_key_tiles(s), widths.tiles)), 0)
        found.append((numbers * KEY_TILE, count))
    if len(found) == 1:
        return found[0]
    width = max(bands.shape[-1] for bands, _ in found)
    (bands, count), (other, other_count) = (
        (jnp.pad(bands, ((0, 0), (0, 0), (0, width - bands.shape[-1]))), count) for bands, count in found
    )
    in_lines = jnp.broadcast_to(tiles < 0, count.shape)
    return jnp.where(in_lines[..., None], bands, other), jnp.where(in_lines, count, other_count)


def column_width(widths: Widths, s: int) -> int:
    """Static number of column slots."""
    return min(s, max(widths.columns, MIN_COLUMNS if widths.lines else 0, 1))


def column_words(
    column_sums: Float[Array, "*heads s"],
    budget: Int[Array, "*heads"],
    visible: Int[Array, "*sequences"],
    target: Float[Array, "*heads"] | None = None,
) -> UInt32[Array, "*heads w"]:
    """The original's columns, as a bitmap: the `max(budget, 30)` largest sums, the first 30 keys among them.

    With `target` mass given, only the best of them that hold it.
    """
    return _forced_top_k(column_sums, SINK_COLUMNS, jnp.maximum(budget, MIN_COLUMNS), visible, target)


def slash_lines(
    diagonal_sums: Float[Array, "*heads s"],
    budget: Int[Array, "*heads"],
    visible: Int[Array, "*sequences"],
    target: Float[Array, "*heads"] | None = None,
) -> UInt32[Array, "*heads w"]:
    """The original's distances, as a bitmap: the `max(budget, 50)` largest sums, 0 … 99 forced.

    With a budget below 100 the nearest of the forced ones are taken; the original leaves open which.
    """
    return _forced_top_k(diagonal_sums, WINDOW_DISTANCES, jnp.maximum(budget, MIN_SLASHES), visible, target)


def _forced_top_k(sums: Array, forced: int, budget: Array, visible: Array, target: Array | None) -> Array:
    position = jnp.arange(sums.shape[-1], dtype=jnp.int32)
    scores = jnp.where(position < forced, jnp.inf, sums)
    scores = jnp.where(position < visible[..., None], scores, -jnp.inf)
    return select.top_k_words(scores, budget, None if target is None else select.Enough(sums, target, forced))


def widened(
    scores: Float[Array, "*heads x"],
    budget: Int[Array, "*heads"],
    mean: Float[Array, "*heads x"],
    threshold: Float[Array, "*heads"],
) -> tuple[Float[Array, "*heads x"], Int[Array, "*heads"]]:
    """What heads with a finite threshold select by, instead of `scores` and `budget`; other heads keep theirs.

    Their scores are the mean weights. Their budget is the number of entries whose mean weight reaches the threshold,
    at least the budget itself and at most `GROWTH` times it.
    """
    reaching = jnp.sum(mean >= threshold[..., None], axis=-1, dtype=jnp.int32)
    return jnp.where(jnp.isfinite(threshold)[..., None], mean, scores), jnp.clip(reaching, budget, GROWTH * budget)


def best_bands(
    scores: Float[Array, "*heads r"],
    budget: Int[Array, "*heads"],
    visible: Int[Array, "*sequences"],
    mass: Float[Array, "*heads r"],
    target: Float[Array, "*heads"] | None = None,
) -> Bool[Array, "*heads r"]:
    """The `budget` best bands with a score above zero (compared in bfloat16), the one next to the diagonal among them.

    With `target` mass given, only the best of them that hold it.
    """
    band = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    reached = (band > 0) & (band * KEY_TILE < visible[..., None] + KEY_TILE) & (scores > 0)
    scores = jnp.where(reached, jnp.where(band == 1, jnp.inf, scores), -jnp.inf)
    enough = None if target is None else select.Enough(mass, target)
    return select.top_k_mask(scores.astype(jnp.bfloat16), budget, enough)


def sure_columns(weights: Float[Array, "*heads p s"], heads: dict[str, Array], rows: Rows) -> Float[Array, "*heads s"]:
    """The mass of keys that are columns for sure (see `SURE_COLUMN`), and 0 at all other keys.

    What a single probe adds to a key's mass is capped at its share. Keys on the diagonal and in the band next to it do
    not count. In heads without spread probes no key is sure.
    """
    key = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    nearest = (heads["positions"] // QUERY_TILE * QUERY_TILE - KEY_TILE).reshape(-1, 1)
    half = 0.5 / jnp.maximum(rows.start + rows.valid, 1).astype(jnp.float32)
    worth = jnp.where(jnp.isfinite(heads["threshold"]), heads["threshold"], half)[..., None]
    most = worth * heads["importance"].sum(-1)[..., None] * rows.share_past(key)
    # No probe counts for more than its share: one sum tells both how much and by how many.
    most_of_row = jnp.broadcast_to(most[..., None, :], weights.shape).reshape(-1, key.size)
    held = jnp.where(key < nearest, jnp.minimum(weights.reshape(-1, key.size), most_of_row), 0)
    held = held.reshape(weights.shape).sum(-2)  # rows as one axis until here: see index/weights.py
    return jnp.where((held >= SURE_COLUMN * most) & heads["spread"][..., None], held, 0)


def uncovered(
    weights: Float[Array, "*heads p s"],
    positions: Int[Array, "*heads p"],
    bands: Bool[Array, "*heads r"],
    apply: Bool[Array, "*heads"],
) -> Float[Array, "*heads s"]:
    """Column sums of the probes' mass that lies outside the diagonal and the given bands.

    Heads where `apply` is False: column sums of all of the mass.
    """
    s, count = weights.shape[-1], num_key_tiles(weights.shape[-1])
    seen = (probes.seen_tiles(bands, positions, count) & apply[..., None, None]).reshape(-1, count)
    seen = jnp.broadcast_to(seen[..., None], (*seen.shape, KEY_TILE)).reshape(-1, count * KEY_TILE)
    rest = jnp.where(seen[:, :s], 0, weights.reshape(-1, s))  # rows as one axis: see index/weights.py
    return rest.reshape(weights.shape).sum(-2)


def uncovered_words(
    scores: Float[Array, "*heads s"],
    budget: Int[Array, "*heads"],
    visible: Int[Array, "*sequences"],
    mass: Float[Array, "*heads s"],
    target: Float[Array, "*heads"] | None = None,
) -> UInt32[Array, "*heads w"]:
    """The `budget` best columns with a score above zero, as a bitmap; the first four keys come first.

    With `target` mass given, only the best of them that hold it. Scores are compared in bfloat16, which takes half the
    passes over them; those that agree in it go to the lower position.
    """
    position = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    scores = jnp.where(position < TILE_SINK_COLUMNS, jnp.inf, jnp.where(scores > 0, scores, -jnp.inf))
    scores = jnp.where(position < visible[..., None], scores, -jnp.inf)
    enough = None if target is None else select.Enough(mass, target, TILE_SINK_COLUMNS)
    return select.top_k_words(scores.astype(jnp.bfloat16), budget, enough)
