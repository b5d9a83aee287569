"""The tables of the Hopper kernel, walked as the kernel walks them: every key of the plan once, and no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_qkv
from plans import int32, random_plan

from pallas_kernels import SparsePlan, plan_builders
from pallas_kernels import tables as hopper_tables
from pallas_kernels.plan import KEY_TILE, QUERY_TILE
from pallas_kernels.plan_check import lists_are_clean

PREPARE = jax.jit(hopper_tables.prepare)
MASK = jax.jit(SparsePlan.to_mask, static_argnums=(1, 2))
CLEAN = jax.jit(lists_are_clean)


def visits(tables: hopper_tables.KernelTables, plan: SparsePlan, z: int, i: int, s: int, q_offset: int) -> np.ndarray:
    """How often each row of query tile `i` of head `z` sees each key, following the steps of the kernel."""
    work = np.asarray(tables.work)[z, i]
    no_bias, steps, bands, whole, diagonal, rows = (int(x) for x in work[:6])
    count = np.zeros((QUERY_TILE, s + 4 * KEY_TILE), int)
    if steps == 0:
        assert rows == 0
        return count[:, :s]
    q0 = q_offset + i * QUERY_TILE
    assert diagonal == q0
    count[:, q0 : q0 + QUERY_TILE] += np.tri(QUERY_TILE, dtype=int)[:, : count.shape[1] - q0]
    listed = [] if tables.blocks is None else [KEY_TILE * x for x in np.asarray(tables.blocks)[z, i, : whole - bands]]
    distances = [] if tables.bands is None else np.asarray(tables.bands)[z, :bands]
    starts = [max(q0 - int(x), 0) for x in distances] + listed
    assert len(starts) == whole
    assert no_bias in (1 + whole // 2, whole // 2) and no_bias > 0
    for start in starts[: 2 * (no_bias - 1)]:
        count[:, start : start + KEY_TILE] += 1
    bias = np.asarray(tables.bias, np.float32)
    bias = bias[min(z, len(bias) - 1), min(i, bias.shape[1] - 1)]
    for step in range(no_bias, steps):
        for place in (2 * step - 2 - whole, 2 * step - 1 - whole):  # among the columns; negative for whole tiles
            half = bias[(place + 2) * KEY_TILE : (place + 3) * KEY_TILE]
            assert half.shape == (KEY_TILE,)
            if place < 0:
                keys = starts[whole + place] + np.arange(KEY_TILE)
            elif place * KEY_TILE < len(bias) - 3 * KEY_TILE and plan.columns is not None:
                columns = np.asarray(plan.columns).reshape(len(tables.work), -1)[z, place * KEY_TILE :][:KEY_TILE]
                keys = np.pad(columns, (0, KEY_TILE - len(columns)))
            else:
                assert not (half == 0).any()
                continue
            count[:, keys[half == 0]] += 1
    count[rows:] = 0
    return count[:, :s]


@pytest.mark.parametrize(
    "t, s, q_offset, lengths", [(300, 300, 0, None), (260, 900, 512, [900, 600]), (300, 300, 0, [0, 64])]
)
@pytest.mark.parametrize("parts", ["all", "columns", "bands", "blocks", "columns+bands", "none"])
def test_every_key_of_the_plan_is_visited_once(rng, parts, t, s, q_offset, lengths):
    b, n = 2, 2
    full = random_plan(rng, b, n, t, s, columns=70, bands=6, blocks=5)
    names = {"columns": "column_count", "bands": "band_count", "blocks": "block_count"}
    kept = {a: getattr(full, a) for part, c in names.items() if parts == "all" or part in parts for a in (part, c)}
    plan = SparsePlan(**kept)
    check_visits(rng, plan, b, n, t, s, q_offset, lengths)


@pytest.mark.parametrize("t, s, q_offset, lengths", [(300, 300, 0, None), (260, 900, 512, [900, 600])])
def test_lists_that_builders_made_are_taken_as_they_are(rng, t, s, q_offset, lengths):
    b, n = 2, 2
    columns = int32(rng.integers(-3, s + 9, (b, n, 50)))
    lines = int32(rng.integers(-3, s + 9, (b, n, 9)))
    blocks = int32(rng.integers(-1, s // KEY_TILE + 2, (b, n, -(-t // QUERY_TILE), 7)))
    for plan in (
        jax.jit(plan_builders.vertical_slash_plan, static_argnames="kv_len")(columns, lines, kv_len=s),
        jax.jit(plan_builders.block_sparse_plan)(blocks),
        plan_builders.a_shape_plan(b, n, sink=s + 5, window=200),
        plan_builders.full_plan(b, n, s),
    ):
        assert plan.clean and CLEAN(plan, q_offset=q_offset).all()
        check_visits(rng, plan, b, n, t, s, q_offset, lengths)


def check_visits(rng, plan, b, n, t, s, q_offset, lengths):
    limits = None if lengths is None else int32(lengths)
    q, k, v = random_qkv(rng, b, t, s, n, 1, 8)
    tables = PREPARE(plan, q, k, v, lengths=limits, q_offset=jnp.int32(q_offset))
    mask = np.asarray(MASK(plan, t, s, q_offset=q_offset, lengths=limits))
    mask = np.broadcast_to(mask, (b, n, t, s)).reshape(b * n, t, s)
    for z in range(b * n):
        for i in range(tables.work.shape[1]):
            rows = mask[z, i * QUERY_TILE : (i + 1) * QUERY_TILE]
            np.testing.assert_array_equal(visits(tables, plan, z, i, s, q_offset)[: len(rows)], rows)


def test_columns_are_gathered_from_the_right_kv_head(rng):
    q, k, v = random_qkv(rng, 1, 200, 200, 4, 2, 8)
    columns = int32(np.sort(rng.permuted(np.tile(np.arange(200), (4, 1)), axis=1)[:, :24], -1)[None])
    plan = SparsePlan(columns, jnp.full((1, 4), 24, jnp.int32))
    tables = PREPARE(plan, q, k, v, lengths=None, q_offset=jnp.int32(0))
    for head in range(4):
        np.testing.assert_array_equal(tables.keys[head], k[0, columns[0, head], head // 2])
        np.testing.assert_array_equal(tables.values[head], v[0, columns[0, head], head // 2])


def test_columns_inside_the_window_take_no_step():
    """Window of 4 bands; the last 256 keys before a query tile are seen anyway, so their columns are left out."""
    columns = int32(np.arange(0, 1024, 8)[None, None])
    plan = SparsePlan(columns, int32([[128]]), int32([[[64, 128, 192, 256]]]), int32([[4]]))
    q = k = v = jnp.zeros((1, 1024, 1, 8))
    work = PREPARE(plan, q, k, v, lengths=None, q_offset=jnp.int32(0)).work
    # Query tile 7 starts at 896: columns before 640 are 80, two key tiles; with 4 bands, 1 + (4 + 2) / 2 steps.
    assert work[0, 7, hopper_tables.STEPS] == 4


def test_what_is_not_finite_spoils_no_row_before_it(rng):
    """Of columns it stands in the bias, where they are seen; of the padding nothing is read."""
    q, k, v = random_qkv(rng, 1, 300, 300, 1, 1, 8)
    k, v = k.at[:, 140, :, 3].set(jnp.nan), v.at[:, 100, :, 5].set(jnp.inf)
    k, v = (x.at[:, 290:].set(jnp.nan) for x in (k, v))
    plan = SparsePlan(int32([[[3, 100, 140, 270, 295]]]), int32([[5]]))
    tables = PREPARE(plan, q, k, v, lengths=int32([290]), q_offset=jnp.int32(0))
    seen, hidden, broken = 0, -np.inf, np.nan
    found = np.asarray(tables.bias, np.float32)[0, :, 2 * KEY_TILE :][:, :6]
    expected = [
        [hidden, hidden, hidden, hidden, hidden, hidden],
        [seen, broken, hidden, hidden, hidden, hidden],
        [seen, broken, broken, hidden, hidden, hidden],
    ]
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(tables.keys).all() and np.isfinite(tables.values).all()
    np.testing.assert_array_equal(tables.values[0, 2], v[0, 140, 0])
    np.testing.assert_array_equal(tables.last_values[0, :34], v[0, 256:290])
    np.testing.assert_array_equal(tables.last_values[0, 34:], np.zeros((94, 1, 8)))


def test_the_longest_query_tiles_come_first_where_no_band_makes_neighbours_alike(rng):
    q = k = v = jnp.zeros((1, 4096, 80, 8))
    blocks = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), (1, 80, 32, 64))
    count = int32(rng.integers(0, 3, (1, 80, 32))).at[0, 0, 31].set(62).at[0, 1, 20].set(40)
    plan = SparsePlan(blocks=blocks, block_count=count, clean=True)
    tables = PREPARE(plan, q, k, v, lengths=None, q_offset=jnp.int32(0))
    steps = np.asarray(tables.work)[..., hopper_tables.STEPS][:, ::-1].ravel()  # heads slow, late tiles first
    long = 16 * 132 * steps > steps.sum()
    assert 2 <= long.sum() < long.size / 2
    np.testing.assert_array_equal(tables.order, [*np.flatnonzero(long), *np.flatnonzero(~long)])
    full = plan_builders.full_plan(1, 80, 4096)
    assert PREPARE(full, q, k, v, lengths=None, q_offset=jnp.int32(0)).order is None
