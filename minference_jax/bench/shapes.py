"""Inputs that benchmarks and GPU tests share: the index of the published comparison, and exact rows to check with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import SparsePlan, plan_builders


def vertical_slash_bench_index(
    b: int, n: int, length: int, *, columns: int = 1024, window: int = 2048, clusters: int = 32, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """int32 `[b, n, C]` random columns and `[b, n, S]` distances, each head its own.

    The distances are 0 .. window-1 and `clusters` runs of 127, which may overlap.
    """
    chosen, lines = [], []
    for head in range(b * n):
        rng = np.random.default_rng(seed + head)
        chosen.append(np.sort(rng.choice(length, min(columns, length), replace=False)))
        starts = rng.integers(min(window, length - 127), length - 126, clusters)
        lines.append(np.concatenate([np.arange(min(window, length)), (starts[:, None] + np.arange(127)).ravel()]))
    return np.reshape(chosen, (b, n, -1)).astype(np.int32), np.reshape(lines, (b, n, -1)).astype(np.int32)


def vertical_slash_bench_plan(b: int, n: int, length: int, **budgets: int) -> SparsePlan:
    """The plan of `vertical_slash_bench_index`."""
    columns, lines = vertical_slash_bench_index(b, n, length, **budgets)
    return plan_builders.vertical_slash_plan(jnp.asarray(columns), jnp.asarray(lines), kv_len=length)


def block_bench_plan(b: int, n: int, length: int, *, blocks: int = 100, seed: int = 0) -> SparsePlan:
    """`blocks` random key tiles for each query tile, fewer where fewer come before it."""
    tiles = -(-length // 128)
    before = 2 * jnp.arange(tiles, dtype=jnp.int32)[:, None]
    draw = jax.random.randint(jax.random.key(seed), (b, n, tiles, blocks), 0, 1 << 30, jnp.int32)
    return plan_builders.block_sparse_plan(jnp.where(before > 0, draw % jnp.maximum(before, 1), -1))


def sample_rows(length: int, heads: int, *, count: int, seed: int = 0) -> list[tuple[int, int]]:
    """(head, row) pairs: rows at the edges of tiles, the last row, and random ones."""
    rng = np.random.default_rng(seed)
    rows = [min(70, length - 1), length - 1, max(length - 129, 0), *rng.integers(0, length, max(count - 3, 0))]
    return [(int(rng.integers(heads)), int(row)) for row in rows[:count]]


def visible_keys(plan: SparsePlan, batch: int, head: int, row: int, kv_len: int) -> np.ndarray:
    """bool [kv_len]: what one row of a full-length sequence sees, computed apart from every implementation."""
    q0 = row // 128 * 128
    seen = np.zeros(kv_len + 128, bool)
    seen[q0 : q0 + 128] = True
    for name in ("columns", "bands", "blocks"):
        part, count = getattr(plan, name), getattr(plan, {"columns": "column_count"}.get(name, f"{name[:-1]}_count"))
        if part is None:
            continue
        where = (batch, head, q0 // 128) if name == "blocks" else (batch, head)
        for value in np.asarray(part[where])[: int(count[where])]:
            start = value if name == "columns" else q0 - value if name == "bands" else 64 * value
            width = 1 if name == "columns" else 64
            if -width < start < kv_len:
                seen[max(start, 0) : start + width] = True
    return seen[:kv_len] & (np.arange(kv_len) <= row)


@jax.jit
def _keys(x: Float[Array, "b s k h"], batch: int, head: int, index: Int[Array, " m"]) -> Float[Array, "m h"]:
    return x[batch, index, head]


def exact_row(
    arrays: tuple[Float[Array, "b t n h"], Float[Array, "b s k h"], Float[Array, "b s k h"]],
    plan: SparsePlan,
    batch: int,
    head: int,
    row: int,
) -> tuple[np.ndarray, float]:
    """(output [h], LSE) of one row in float32 (float64 sums on the host), from the plan's own meaning."""
    q, k, v = arrays
    kv_head = head // (q.shape[2] // k.shape[2])
    index = np.nonzero(visible_keys(plan, batch, head, row, k.shape[1]))[0]
    # Padded to a multiple, so that one compiled gather serves nearly every row.
    padded = jnp.asarray(np.resize(index, -(-index.size // 4096) * 4096), jnp.int32)
    keys, values = (np.asarray(_keys(x, batch, kv_head, padded), np.float64)[: index.size] for x in (k, v))
    scores = keys @ np.asarray(q[batch, row, head], np.float64) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum(), float(scores.max() + np.log(weights.sum()))
