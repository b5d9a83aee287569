"""The index with a probe every few rows: what is worth a visit, what no head goes below, that padding is nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.attention import make_plan
from minference_jax.index import tile_mass, worth
from minference_jax.index.recall import recall
from minference_jax.patterns import BlockSparse, HeadPatterns, PerTile, SharedDensity, VerticalSlash, layer_patterns
from pallas_kernels.plan_check import lists_are_clean

PLAN = jax.jit(make_plan, static_argnames=("pattern",))
TILE_ROWS = jax.jit(tile_mass.tile_rows, static_argnums=(1, 2), static_argnames="ends")
RULE = PerTile(8, 0.004, floor_columns=60, floor_slashes=60)


def heads(rng, b, t, s, n=4, kv=2, h=16):
    q = jnp.asarray(2 * rng.standard_normal((b, t, n, h)), jnp.float32)
    return q, jnp.asarray(rng.standard_normal((b, s, kv, h)), jnp.float32)


def listed(part, count, *at):
    return np.asarray(part[at])[: int(count[at])]


def same_plan(one, other, row, other_row):
    for name, count in (("columns", "column_count"), ("blocks", "block_count")):
        a, b = getattr(one, count)[row], getattr(other, count)[other_row]
        for at in np.ndindex(b.shape):
            assert int(a[at]) == int(b[at])
            np.testing.assert_array_equal(
                listed(getattr(one, name)[row], a, *at), listed(getattr(other, name)[other_row], b, *at)
            )


@pytest.fixture
def by_hand():
    """Five query tiles; one column in all rows, one block of one query tile, and little on the rest."""
    before = np.zeros((1, 1, 1, 5, 10, 64), np.float32)
    for i in range(5):
        before[..., i, : 2 * i, :] = 128 * 0.001
    before[..., 1:, 0, 7] = 128 * 0.2
    before[..., 4, 1, :32] = 128 * 0.02
    rows, start = jnp.full((1, 1, 1, 5), 128.0), 128 * jnp.arange(5, dtype=jnp.int32)
    return worth.Mass(jnp.asarray(before), jnp.full((1, 1, 1), 9.0), rows, start)


def test_what_is_worth_a_visit_by_hand(by_hand):
    mass = by_hand
    columns, blocks = jax.jit(worth.worth_a_visit)(mass, jnp.full((1, 1, 1), 0.009))
    np.testing.assert_array_equal(np.flatnonzero(columns), [7])
    np.testing.assert_array_equal(np.argwhere(blocks[0, 0, 0]), [[4, 1]])
    expected = 9 + 128 * (0.2 * 4 + 0.02 * 32 + 0.001 * 32)
    np.testing.assert_allclose(jax.jit(worth.held)(mass, columns, blocks), expected, rtol=1e-6)


def test_no_head_keeps_less_than_the_original(rng):
    """With every row a probe the estimate is exact. A threshold that nothing reaches leaves the floor alone."""
    t, s = 200, 456  # the last rows: a chunk
    q, k = heads(rng, 2, t, s)
    where = {"lengths": jnp.asarray([s, s - 77], jnp.int32), "q_offset": s - t}
    rule = layer_patterns(PerTile(1, 0.1, 60, 60), 4)

    def at(threshold):
        return dataclasses.replace(rule, budgets=(dataclasses.replace(rule.budgets[0], threshold=threshold),))

    plan = jax.jit(lambda threshold: make_plan(q, k, at(threshold), **where))
    floor, more = (plan(jnp.full((4,), threshold, jnp.float32)) for threshold in (0.1, 2e-4))
    assert more.clean and lists_are_clean(more, q_offset=s - t).all()
    kept = recall(q, k, floor, **where)
    theirs = make_plan(q, k, VerticalSlash(60, 60), **where)
    assert (kept > recall(q, k, theirs, **where)).all()
    assert (recall(q, k, more, **where) >= kept).all()
    assert (more.column_count > floor.column_count).all()


def test_padded_batch_equals_each_sequence_alone_and_vmap(rng):
    lengths = np.array([448, 190, 64, 1], np.int32)
    q, k = heads(rng, 4, 448, 448)
    together = PLAN(q, k, RULE, lengths=jnp.asarray(lengths))
    one = jax.vmap(lambda q, k, length: make_plan(q[None], k[None], RULE, lengths=length[None]))
    mapped = jax.tree.map(lambda x: x[:, 0], one(q, k, jnp.asarray(lengths)))
    jax.tree.map(np.testing.assert_array_equal, together, mapped)
    alone = PLAN(q[1:2, :190], k[1:2, :190], RULE)
    same_plan(together, alone, 1, 0)


def test_shard_map_over_heads(rng):
    q, k = heads(rng, 1, 256, 256)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, out = jax.sharding.PartitionSpec(None, None, "heads"), jax.sharding.PartitionSpec(None, "heads")
    sharded = jax.shard_map(
        lambda q, k: make_plan(q, k, RULE), mesh=mesh, in_specs=(spec, spec), out_specs=out, check_vma=False
    )
    jax.tree.map(np.testing.assert_array_equal, PLAN(q, k, RULE), jax.jit(sharded)(q, k))


def test_beside_another_kind(rng):
    """Each head takes its own parts, as it would where all heads are of its kind."""
    q, k = heads(rng, 1, 256, 256)
    mixed = PLAN(q, k, (RULE, RULE, BlockSparse(3), BlockSparse(3)))
    all_ours, all_theirs = PLAN(q, k, RULE), PLAN(q, k, BlockSparse(3))
    np.testing.assert_array_equal(mixed.column_count, [[*all_ours.column_count[0, :2], 0, 0]])
    for head, alone in ((0, all_ours), (1, all_ours), (2, all_theirs), (3, all_theirs)):
        for i in range(2):
            np.testing.assert_array_equal(
                listed(mixed.blocks, mixed.block_count, 0, head, i), listed(alone.blocks, alone.block_count, 0, head, i)
            )


def test_probe_rows_of_the_last_tile():
    valid = jnp.asarray([256, 129, 100, 0], jnp.int32)
    rows, share = TILE_ROWS(valid, 2, 32, ends=False)
    np.testing.assert_array_equal(rows[0], [[16, 48, 80, 112], [144, 176, 208, 240]])
    np.testing.assert_allclose(share[0], 32.0)
    assert int(rows[1, 1, 0]) == 128  # the only row of its tile
    np.testing.assert_allclose(share[1, 1], [1, 0, 0, 0])
    np.testing.assert_allclose(share[2], [[100 / 3] * 3 + [0], [0] * 4], rtol=1e-6)
    rows, ends = TILE_ROWS(valid, 2, 32, ends=True)
    np.testing.assert_array_equal(rows[0], [[0, 32, 64, 127], [128, 160, 192, 255]])
    assert int(rows[1, 1, 0]) == 128
    np.testing.assert_array_equal(rows[2, 0], [0, 32, 64, 99])
    np.testing.assert_allclose(ends[:, :, 0], [[32, 32], [32, 1], [25, 0], [0, 0]])
    every_row, _ = TILE_ROWS(valid, 2, 1, ends=True)
    np.testing.assert_array_equal(every_row[2, 0, :100], np.arange(100))


def test_strides_must_agree():
    other = PerTile(16, 0.004, 60, 60)
    with pytest.raises(ValueError, match="agree"):
        HeadPatterns(((RULE, other),)).arrays()
    with pytest.raises(ValueError, match="agree"):
        HeadPatterns(((SharedDensity(0.6, every=8), SharedDensity(0.3, every=32)),)).arrays()
