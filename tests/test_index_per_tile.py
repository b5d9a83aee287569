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
RULE = PerTile(8, 0.004, floor_columns=60, floor_slashes=60)
SHARED = SharedDensity(0.6, every=8)


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
    columns, blocks = worth.worth_a_visit(mass, jnp.full((1, 1, 1), 0.009))
    np.testing.assert_array_equal(np.flatnonzero(columns), [7])
    np.testing.assert_array_equal(np.argwhere(blocks[0, 0, 0]), [[4, 1]])
    expected = 9 + 128 * (0.2 * 4 + 0.02 * 32 + 0.001 * 32)
    np.testing.assert_allclose(worth.held(mass, columns, blocks), expected, rtol=1e-6)


def test_heads_share_a_density_by_hand(by_hand):
    """A second head has half of the little mass of the first, so all that two heads may visit goes to the first."""
    diagonal, column, block, causal = 5 * 128 * 129 / 2, 4 * 128, 64 * 128, 640 * 641 / 2
    before = jnp.concatenate([by_hand.before, jnp.minimum(by_hand.before, 128 * 0.001) / 2], axis=2)
    mass = by_hand._replace(before=before, diagonal=jnp.full((1, 1, 2), 9.0))
    found = jax.jit(lambda density: worth.within(mass, density, 0))
    for cells, blocks_of_first in ((column + block, [[4, 1]]), (column + block - 1, []), (column, [])):
        columns, blocks = found(jnp.full((1, 1, 2), (2 * diagonal + cells) / (2 * causal)))
        np.testing.assert_array_equal(np.argwhere(columns[0, 0]), [[0, 7]])
        np.testing.assert_array_equal(np.argwhere(blocks[0, 0, 0]).reshape(-1, 2), np.reshape(blocks_of_first, (-1, 2)))
        assert not blocks[0, 0, 1].any()
        one_more = 0 if blocks_of_first else block
        assert (
            diagonal * 2 + cells - one_more < worth.visited(mass, columns, blocks).sum() + 1 <= diagonal * 2 + cells + 1
        )
    columns, _ = found(jnp.asarray([[[(diagonal + column) / causal, jnp.inf]]]))
    np.testing.assert_array_equal(np.argwhere(columns[0, 0]), [[0, 7]])  # a head of another kind has no part in it
    assert not found(jnp.full((1, 1, 2), 0.1))[0].any()  # less than the diagonal


def test_density_is_met_from_below_in_every_sequence(rng):
    """One program for all prompts of a shape; short and empty sequences; heads that look at few keys get few."""
    t, s = 384, 640  # the last rows: a chunk
    q, k = heads(rng, 4, t, s)
    q = q * jnp.asarray([3, 1, 1, 0.2], q.dtype)[:, None]
    wanted = jax.jit(lambda q, k, lengths: make_plan(q, k, SHARED, lengths=lengths, q_offset=s - t))
    for lengths in ([640, 530, 300, 0], [639, 512, 257, 256]):
        plan = wanted(q, k, jnp.asarray(lengths, jnp.int32))
        assert lists_are_clean(plan, q_offset=s - t).all()
        found = np.asarray(plan.density(t, s, lengths=jnp.asarray(lengths), q_offset=s - t))
        rows = np.clip(np.asarray(lengths) - (s - t), 0, None)
        tile = 64 * 128 / np.maximum(4 * rows * (s - t + (rows + 1) / 2), 1)
        short = rows <= 0
        assert (found[short] == 0).all()
        mean = found.mean(-1)[~short]
        assert (mean <= 0.6 + 1e-6).all() and (mean > 0.6 - 2 * tile[~short]).all(), mean
        assert found[0, 0] != found[0, 3]
    assert wanted._cache_size() == 1


def test_what_the_question_asks_for_is_part_of_the_density(rng):
    """The last 64 valid rows see every key, and the keys that these attend to most are seen by all rows."""
    t = 1280
    q, k = heads(rng, 3, t, t)
    lengths = jnp.asarray([t, 1200, 100], jnp.int32)  # 1,200: the last 64 rows lie in two query tiles
    plan = PLAN(q, k, SharedDensity(0.6, every=8, question=50), lengths=lengths)
    assert lists_are_clean(plan).all()
    mask = np.asarray(plan.to_mask(t, t, lengths=lengths))
    causal = np.tril(np.ones((t, t), bool))
    weights = jax.nn.softmax(jnp.where(causal, jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, 2)) / 4, -jnp.inf))
    for row, length in enumerate((t, 1200)):
        np.testing.assert_array_equal(
            mask[row, :, length - 64 : length, :length], causal[None, length - 64 : length, :length].repeat(4, 0)
        )
        best = np.argsort(-np.asarray(weights[row, :, length - 64 : length, : length - 256].sum(1)))[:, :20]
        for head, keys in enumerate(best):
            assert mask[row, head, 1000, keys[keys <= 1000]].all()
        assert 0.58 < plan.density(t, t, lengths=lengths)[row].mean() <= 0.6
    assert plan.density(t, t, lengths=lengths)[2].min() == 1  # shorter than what it asks for
    with pytest.raises(ValueError, match="question needs a density"):
        VerticalSlash(question=5)


def test_a_head_that_looks_at_the_token_before_sees_it_across_tiles():
    """Only the first row of a query tile needs the tile before, so it has to be among the probes."""
    t = 640
    angles = np.arange(t)[:, None] * np.linspace(0.3, 3, 16)
    keys = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    q, k = 8 * np.roll(keys, 1, 0)[None, :, None], keys[None, :, None]  # row i asks for key i - 1
    plan = PLAN(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), SharedDensity(0.5, every=16))
    mask = np.asarray(plan.to_mask(t, t))[0, 0]
    assert all(mask[row, row - 1] for row in range(128, t, 128))


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


@pytest.mark.parametrize("rule", [RULE, SHARED], ids=["threshold", "density"])
def test_padded_batch_equals_each_sequence_alone_and_vmap(rng, rule):
    lengths = np.array([448, 190, 64, 1], np.int32)
    q, k = heads(rng, 4, 448, 448)
    together = PLAN(q, k, rule, lengths=jnp.asarray(lengths))
    one = jax.vmap(lambda q, k, length: make_plan(q[None], k[None], rule, lengths=length[None]))
    mapped = jax.tree.map(lambda x: x[:, 0], one(q, k, jnp.asarray(lengths)))
    jax.tree.map(np.testing.assert_array_equal, together, mapped)
    alone = PLAN(q[1:2, :190], k[1:2, :190], rule)
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
    rows, share = tile_mass.tile_rows(valid, 2, 32, ends=False)
    np.testing.assert_array_equal(rows[0], [[16, 48, 80, 112], [144, 176, 208, 240]])
    np.testing.assert_allclose(share[0], 32.0)
    assert int(rows[1, 1, 0]) == 128  # the only row of its tile
    np.testing.assert_allclose(share[1, 1], [1, 0, 0, 0])
    np.testing.assert_allclose(share[2], [[100 / 3] * 3 + [0], [0] * 4], rtol=1e-6)
    rows, ends = tile_mass.tile_rows(valid, 2, 32, ends=True)
    np.testing.assert_array_equal(rows[0], [[0, 32, 64, 127], [128, 160, 192, 255]])
    assert int(rows[1, 1, 0]) == 128
    np.testing.assert_array_equal(rows[2, 0], [0, 32, 64, 99])
    np.testing.assert_allclose(ends[:, :, 0], [[32, 32], [32, 1], [25, 0], [0, 0]])
    every_row, _ = tile_mass.tile_rows(valid, 2, 1, ends=True)
    np.testing.assert_array_equal(every_row[2, 0, :100], np.arange(100))


def test_strides_must_agree():
    other = PerTile(16, 0.004, 60, 60)
    with pytest.raises(ValueError, match="agree"):
        HeadPatterns(((RULE, other),)).arrays()
    with pytest.raises(ValueError, match="agree"):
        HeadPatterns(((SHARED, SharedDensity(0.3, every=32)),)).arrays()
