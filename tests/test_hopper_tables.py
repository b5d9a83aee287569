"""The tables of the Hopper kernel, walked as the kernel walks them: every key of the plan once, and no other."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_qkv
from plans import int32, random_plan

from pallas_kernels import SparsePlan, hopper_tables
from pallas_kernels.plan import KEY_TILE, QUERY_TILE


def visits(tables: hopper_tables.KernelTables, plan: SparsePlan, z: int, i: int, s: int, q_offset: int) -> np.ndarray:
    """How often each row of query tile `i` of head `z` sees each key, following the steps of the kernel."""
    work = np.asarray(tables.work)[z, i]
    no_bias, steps, bands, whole, diagonal, rows = (int(x) for x in work[:6])
    count = np.zeros((QUERY_TILE, s + 4 * KEY_TILE), int)
    if steps == 0:
        assert rows == 0
        return count[:, :s]
    q0 = q_offset + i * QUERY_TILE
    assert diagonal * KEY_TILE == q0
    count[:, q0 : q0 + QUERY_TILE] += np.tri(QUERY_TILE, dtype=int)[:, : count.shape[1] - q0]
    listed = [] if tables.blocks is None else [x for x in np.asarray(tables.blocks)[z, i] if x >= 0]
    tiles = [diagonal - int(x) for x in np.asarray(tables.bands)[z, :bands]] + listed
    assert len(tiles) == whole and min(tiles, default=0) >= 0
    assert no_bias == 1 + whole // 2
    for tile in tiles:
        count[:, tile * KEY_TILE : (tile + 1) * KEY_TILE] += 1
    bias = np.asarray(tables.bias, np.float32)
    for step in range(no_bias, steps):
        start = (2 * step - 1 - whole) * KEY_TILE  # zeros, if the first half of this step is the last whole tile
        row = bias[min(z, len(bias) - 1), min(i, bias.shape[1] - 1), start : start + 2 * KEY_TILE]
        assert row.shape == (2 * KEY_TILE,)
        for offset in np.nonzero(row == 0)[0]:
            column = start + offset - KEY_TILE
            if column >= 0:
                assert plan.columns is not None
                count[:, np.asarray(plan.columns).reshape(len(tables.work), -1)[z, column]] += 1
    count[rows:] = 0
    return count[:, :s]


@pytest.mark.parametrize(
    "t, s, q_offset, lengths", [(300, 300, 0, None), (260, 900, 512, [900, 600]), (130, 130, 0, [0, 64])]
)
@pytest.mark.parametrize("parts", ["all", "columns", "bands", "blocks", "none"])
def test_every_key_of_the_plan_is_visited_once(rng, parts, t, s, q_offset, lengths):
    b, n = 2, 2
    full = random_plan(rng, b, n, t, s, columns=70, bands=6, blocks=5)
    names = {"columns": "column_count", "bands": "band_count", "blocks": "block_count"}
    kept = {a: getattr(full, a) for part, c in names.items() if parts in ("all", part) for a in (part, c)}
    plan = SparsePlan(**kept)
    limits = None if lengths is None else int32(lengths)
    q, k, v = random_qkv(rng, b, t, s, n, 1, 8)
    tables = hopper_tables.prepare(plan, q, k, v, lengths=limits, q_offset=jnp.int32(q_offset))
    mask = np.asarray(plan.to_mask(t, s, q_offset=q_offset, lengths=limits))
    mask = np.broadcast_to(mask, (b, n, t, s)).reshape(b * n, t, s)
    for z in range(b * n):
        for i in range(tables.work.shape[1]):
            rows = mask[z, i * QUERY_TILE : (i + 1) * QUERY_TILE]
            np.testing.assert_array_equal(visits(tables, plan, z, i, s, q_offset)[: len(rows)], rows)


def test_columns_are_gathered_from_the_right_kv_head(rng):
    q, k, v = random_qkv(rng, 1, 200, 200, 4, 2, 8)
    columns = int32(np.sort(rng.permuted(np.tile(np.arange(200), (4, 1)), axis=1)[:, :24], -1)[None])
    plan = SparsePlan(columns, jnp.full((1, 4), 24, jnp.int32))
    tables = hopper_tables.prepare(plan, q, k, v, lengths=None, q_offset=jnp.int32(0))
    for head in range(4):
        np.testing.assert_array_equal(tables.keys[head], k[0, columns[0, head], head // 2])
        np.testing.assert_array_equal(tables.values[head], v[0, columns[0, head], head // 2])


def test_columns_inside_the_window_take_no_step():
    """Window of 4 bands; the last 256 keys before a query tile are seen anyway, so their columns are left out."""
    columns = int32(np.arange(0, 1024, 8)[None, None])
    plan = SparsePlan(columns, int32([[128]]), int32([[[64, 128, 192, 256]]]), int32([[4]]))
    q = k = v = jnp.zeros((1, 1024, 1, 8))
    work = hopper_tables.prepare(plan, q, k, v, lengths=None, q_offset=jnp.int32(0)).work
    # Query tile 7 starts at 896: columns before 640 are 80, two key tiles; with 4 bands, 1 + (4 + 2) / 2 steps.
    assert work[0, 7, hopper_tables.STEPS] == 4
