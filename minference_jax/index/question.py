"""The columns that the end of a prompt asks for: the keys that its last 64 rows attend to most."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.index import probes, select
from minference_jax.index.tile_mass import last_rows
from minference_jax.index.weights import lazy_weights
from pallas_kernels.plan import KEY_TILE, num_key_tiles


@partial(jax.tree_util.register_dataclass, data_fields=["positions", "count", "in_tile"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Columns:
    """Key positions of each head, and how many lie in each key tile."""

    positions: Int[Array, "b n C"]
    """Ascending; s from the count on."""

    count: Int[Array, "b n"]

    in_tile: Int[Array, "b n j"]


def question_columns(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    count: Int[Array, " n"],
    width: int,
    *,
    valid: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
) -> Columns:
    """The `count` keys of each head that the last 64 valid rows give most weight together; at most `width` (static).

    Keys without any weight are never columns. Equal weights go to the lower position.

    Cost: the scores of 64 rows with all keys, and some twenty reads of a row of sums for each head.
    """
    b, _, n, _ = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    heads = last_rows(q, kv_heads, valid, q_offset)
    heads |= probes.by_kv_head({"count": jnp.clip(count, 0, width)}, b, n, kv_heads)

    def best(k: Array, heads: dict[str, Array], _: Any) -> Array:
        scores, factor = probes.probe_scores(heads["last"], k, scale)
        sums = lazy_weights(scores, factor, heads["last_positions"]).sum_by_key()
        return select.top_k_words(jnp.where(sums > 0, sums, -jnp.inf), heads["count"])

    size = n // kv_heads * probes.PROBES * s * k.dtype.itemsize
    words = probes.map_heads(best, k, heads, valid, bytes_per_kv_head=size).reshape(b, n, -1)
    positions, found = select.word_positions(words, width, s)
    tiles = num_key_tiles(s)
    bits = jax.lax.population_count(words).astype(jnp.int32)
    bits = jnp.pad(bits, ((0, 0), (0, 0), (0, 2 * tiles - bits.shape[-1])))
    return Columns(positions, found, bits.reshape(b, n, tiles, 2).sum(-1))


def column_masses(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    columns: Columns,
    rows: Int[Array, "b i p"],
    share: Float[Array, "b i p"],
    lse: Float[Array, "b n i p"],
    *,
    q_offset: Int[Array, ""],
    scale: float,
) -> Float[Array, "b n i j"]:
    """What of each tile's mass lies on its columns: `tile_masses` of these keys alone.

    **Arguments:** `rows`, `share`: the probes; `lse`: the log-sum-exp of each over all its keys, −inf for one that is
    none.

    Cost: the scores of all probes with the columns, which are held for all heads.
    """
    b, _, n, h = q.shape
    s, kv_heads, width = k.shape[1], k.shape[2], columns.positions.shape[-1]
    batch = jnp.arange(b, dtype=jnp.int32)[:, None, None]
    head = jnp.arange(n, dtype=jnp.int32)[None, :, None]
    keys = k.at[batch, jnp.minimum(columns.positions, s - 1), head // (n // kv_heads)].get(mode="promise_in_bounds")
    some = q.at[batch, rows].get(mode="clip").transpose(0, 3, 1, 2, 4).reshape(b, n, -1, h)
    exact = jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
    scores = jnp.einsum("bnrh,bnch->bnrc", some, keys, precision=exact, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, n, *rows.shape[1:], width) * jnp.float32(scale)
    seen = columns.positions[:, :, None, None] <= (rows + q_offset)[:, None, ..., None]
    # A key's weight is at most 1; a kernel's `lse` is too small where scores differ beyond what it can tell apart.
    weights = jnp.minimum(scores - lse[..., None], 0)
    weights = jnp.exp(jnp.where(seen & jnp.isfinite(lse)[..., None], weights, -jnp.inf))
    weights = (weights * share[:, None, ..., None]).sum(-2)  # [b, n, i, C]
    # A tile's columns lie side by side: their sum is a difference of running sums.
    sums = jnp.pad(jnp.cumsum(weights, axis=-1), ((0, 0), (0, 0), (0, 0), (1, 0)))
    ends = jnp.broadcast_to(jnp.cumsum(columns.in_tile, axis=-1)[:, :, None], (*sums.shape[:3], num_key_tiles(s)))
    up_to = jnp.take_along_axis(sums, ends, axis=-1, mode="clip")
    return up_to - jnp.pad(up_to[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))


def open_keys(columns: Columns) -> Int[Array, "b n j"]:
    """Keys of each tile that are no columns."""
    return KEY_TILE - columns.in_tile
