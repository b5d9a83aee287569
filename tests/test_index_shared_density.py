"""The index of SharedDensity: against a slow rule in NumPy, the density met from below, and what is always visited."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.attention import make_plan
from minference_jax.index.question import Columns, column_masses
from minference_jax.index.shared_density import shared_density_index
from minference_jax.patterns import SharedDensity
from pallas_kernels.index import tile_keys
from pallas_kernels.plan_check import lists_are_clean

PLAN = jax.jit(make_plan, static_argnames=("pattern",))


@partial(jax.jit, static_argnames=("every", "question_width", "axis_name", "scale"))
def index(q, k, density, question=None, threshold=None, *, lengths=None, q_offset=0, every=16, scale=0.25, **static):
    lengths = jnp.full(q.shape[:1], k.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    return shared_density_index(
        q, k, density, question, threshold,
        every=every, lengths=lengths, q_offset=jnp.asarray(q_offset, jnp.int32), scale=scale, **static,
    )  # fmt: skip


def heads(rng, b, t, s, n=4, kv=2, h=16):
    q = jnp.asarray(2 * rng.standard_normal((b, t, n, h)), jnp.float32)
    return q, jnp.asarray(rng.standard_normal((b, s, kv, h)), jnp.float32)


def visited_tiles(plan, row, key_tiles):
    """bool [n, i, j] of one sequence."""
    blocks, count = np.asarray(plan.blocks[row]), np.asarray(plan.block_count[row])
    flags = np.zeros((*count.shape, key_tiles), bool)
    for at in np.ndindex(count.shape):
        flags[at][blocks[at][: count[at]]] = True
    return flags


def slow_rule(q, k, density, threshold, every, length, q_offset, scale):
    """One sequence: (tiles that must be visited, the others by falling worth, cells of all, cells and worth a tile)."""
    t, n, _ = q.shape
    s, group = k.shape[0], n // k.shape[1]
    tiles, key_tiles, valid = -(-t // 128), -(-s // 64), min(length - q_offset, t)
    must, worth, cells = (np.zeros((n, tiles, key_tiles)) for _ in range(3))
    causal = diagonal = 0.0
    for i in range(tiles):
        rows = min(max(valid - 128 * i, 0), 128)
        if not rows:
            continue
        causal += (q_offset + 128 * i) * rows + rows * (rows + 1) / 2
        diagonal += rows * (rows + 1) / 2
        probes = np.arange(128 * i, 128 * i + rows, every)
        share = rows / len(probes)
        probes[-1] = 128 * i + rows - 1
        past = (q_offset + 128 * i) // 64
        cells[:, i, :past] = 64 * rows
        must[:, i, : past if 128 * (i + 1) > valid - 64 else 1] = 1
        must[:, i, past:] = 0
        for head in range(n):
            for row in probes:
                scores = scale * (k[: q_offset + row + 1, head // group] @ q[row, head])
                weights = np.exp(scores - scores.max())
                np.add.at(worth[head, i], np.arange(len(weights)) // 64, share * weights / weights.sum())
        worth[:, i] /= 64 * rows
    takes_part = np.isfinite(density)[:, None, None]
    must, open_tiles = (must > 0) & takes_part, (cells > 0) & takes_part & (worth >= threshold[:, None, None])
    most = density[np.isfinite(density)].sum() * causal - np.isfinite(density).sum() * diagonal
    order = [at for at in sorted(map(tuple, np.argwhere(open_tiles & ~must)), key=lambda at: -worth[at])]
    return must, order, most, cells, worth


@pytest.mark.parametrize("offset", [0, 256], ids=["whole", "part"])
def test_is_the_slow_rule(rng, offset):
    """Three sequences of one program; a head that takes no part; one with a threshold; probes that fill no tile."""
    t, s, every = 1152, 1152 + offset, 32
    q, k = heads(rng, 3, t, s)
    q = q * jnp.asarray([1.5, 1, 1, 0.2], q.dtype)[:, None]
    density = np.asarray([0.8, 0.5, np.inf, 0.5], np.float32)
    threshold = np.asarray([0, 0.0012, 0, 0], np.float32)
    lengths = [s, offset + 777, offset]
    plan = index(
        q, k, jnp.asarray(density), None, jnp.asarray(threshold), lengths=lengths, q_offset=offset, every=every
    )
    assert plan.clean and lists_are_clean(plan, q_offset=offset).all()
    for row, length in enumerate(lengths):
        found = visited_tiles(plan, row, -(-s // 64))
        must, order, most, cells, worth = slow_rule(
            *(np.asarray(x[row], np.float64) for x in (q, k)), density, threshold, every, length, offset, 0.25
        )
        assert found[must].all() and not found[2].any()
        chosen = {tuple(at) for at in np.argwhere(found & ~must)}
        assert chosen <= set(order)
        spent = cells[found].sum()
        assert spent <= most or not chosen
        left = [at for at in order if at not in chosen]
        assert not left or spent + cells.max() > most  # not one tile more
        if chosen and left:  # equal worths (to 1/1,024 of an octave) are taken in order of position
            assert min(worth[at] for at in chosen) > (1 - 2e-3) * max(worth[at] for at in left)
    assert not plan.block_count[2].any()  # no valid row


def test_density_is_met_from_below_as_the_plan_counts_it(rng):
    """One program for all prompts of a shape; heads differ."""
    t, s = 1024, 1280
    q, k = heads(rng, 2, t, s)
    q = q * jnp.asarray([3, 1, 1, 0.2], q.dtype)[:, None]
    wanted = jax.jit(
        lambda q, k, lengths: make_plan(q, k, SharedDensity(0.6, every=16), lengths=lengths, q_offset=s - t)
    )
    for lengths in ([1280, 1190], [1279, 1100]):
        plan = wanted(q, k, jnp.asarray(lengths, jnp.int32))
        found = np.asarray(plan.density(t, s, lengths=jnp.asarray(lengths), q_offset=s - t))
        rows = np.asarray(lengths) - (s - t)
        tile = 64 * 128 / (4 * rows * (s - t + (rows + 1) / 2))
        assert (found.mean(-1) <= 0.6 + 1e-6).all() and (found.mean(-1) > 0.6 - tile).all()
        assert found[0, 0] != found[0, 3]
    assert wanted._cache_size() == 1


def test_question_columns_are_part_of_the_density_and_tiles_do_without_them(rng):
    """The last 64 rows see every key, the keys that they attend to most are seen by all rows, and a heavy key that is a
    column earns its tile nothing."""
    t = 1536
    q, k = heads(rng, 2, t, t)
    heavy = 70  # every query looks at it
    k = k.at[:, heavy].set(0).at[:, heavy, :, 0].set(12)
    q = q.at[..., 0].set(3)
    lengths = jnp.asarray([t, 1400], jnp.int32)
    density, question = jnp.full((4,), 0.5), jnp.full((4,), 50, jnp.int32)
    plan = index(q, k, density, question, lengths=lengths, question_width=60)
    assert lists_are_clean(plan).all() and plan.columns.shape == (2, 4, 60) and (plan.column_count == 50).all()
    mask = np.asarray(plan.to_mask(t, t, lengths=lengths))
    causal = np.tril(np.ones((t, t), bool))
    scores = np.einsum("bthd,bshd->bhts", np.asarray(q), np.asarray(k).repeat(2, 2), optimize=True) / 4
    weights = np.exp(np.where(causal, scores - scores.max(-1, keepdims=True), -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    for row, length in enumerate((t, 1400)):
        np.testing.assert_array_equal(
            mask[row, :, length - 64 : length, :length], causal[None, length - 64 : length, :length].repeat(4, 0)
        )
        best = np.argsort(-np.asarray(weights[row, :, length - 64 : length, :length].sum(1)))[:, :40]
        for head, keys in enumerate(best):
            assert mask[row, head, 1000, keys[keys <= 1000]].all()
    found = plan.density(t, t, lengths=lengths).mean(-1)
    assert (found <= 0.5).all() and (found > 0.5 - 1e-2).all()
    assert (plan.columns == heavy).any(-1).all()
    without = index(q, k, density, lengths=lengths)
    middle = slice(3, 10)
    assert visited_tiles(without, 0, 24)[:, middle, 1].all()
    assert not visited_tiles(plan, 0, 24)[:, middle, 1].all()


def test_columns_weigh_no_more_than_their_rows(rng):
    """Also where the log-sum-exps are far too small, as a kernel's are of scores that it can't tell apart."""
    q, k = heads(rng, 1, 128, 128)
    positions = jnp.broadcast_to(jnp.asarray([0, 5, 70], jnp.int32), (1, 4, 3))
    columns = Columns(positions, jnp.full((1, 4), 3), jnp.broadcast_to(jnp.asarray([2, 1], jnp.int32), (1, 4, 2)))
    rows, share = jnp.asarray([[[3, 100]]], jnp.int32), jnp.asarray([[[2.0, 7.0]]])
    lse = jnp.full((1, 4, 1, 2), -1e3)
    masses = jax.jit(lambda lse: column_masses(q, k, columns, rows, share, lse, q_offset=jnp.int32(0), scale=0.25))(lse)
    np.testing.assert_allclose(masses, np.broadcast_to([2 + 7 + 7, 7], masses.shape))


def test_a_threshold_visits_less_of_a_prompt_that_needs_less(rng):
    t = 1024
    q, k = heads(rng, 1, t, t)
    density = jnp.full((4,), 0.9)
    free, thrifty, none = (
        index(q, k, density, None, None if x is None else jnp.full((4,), x)).density(t, t).mean()
        for x in (None, 0.002, 1.0)
    )
    assert free > thrifty > none > 0.2  # the diagonal, the first tile and the last query tile


def test_equal_worths_go_to_the_first_and_fill_the_density():
    """All tokens alike: the worths of a query tile are equal."""
    t = 1024
    q, k = jnp.ones((2, t, 2, 16)), jnp.ones((2, t, 1, 16))
    plan = index(q, k, jnp.asarray([0.6, 0.6]))
    tile = 64 * 128 / (2 * t * (t + 1) / 2)
    assert 0.6 - tile < plan.density(t, t)[0].mean() <= 0.6
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], x[1]), plan)
    again = index(q, k, jnp.asarray([0.6, 0.6]))
    jax.tree.map(np.testing.assert_array_equal, plan, again)
    for row in np.asarray(plan.blocks[0, 0]).tolist():
        assert row == sorted(row[: len(set(row))]) + row[len(set(row)) :]


def test_padded_batch_equals_each_sequence_alone_and_vmap(rng):
    t, lengths = 1024, np.array([1024, 700, 64, 1], np.int32)
    q, k = heads(rng, 4, t, t)
    rule = SharedDensity(0.6, every=16, question=20)
    together = PLAN(q, k, rule, lengths=jnp.asarray(lengths))
    one = jax.vmap(lambda q, k, length: make_plan(q[None], k[None], rule, lengths=length[None]))
    mapped = jax.tree.map(lambda x: x[:, 0], jax.jit(one)(q, k, jnp.asarray(lengths)))
    jax.tree.map(np.testing.assert_array_equal, together, mapped)
    alone = PLAN(q[1:2, :700], k[1:2, :700], rule)
    same = together.to_mask(t, t, lengths=jnp.asarray(lengths))[1:2, :, :700, :700]
    np.testing.assert_array_equal(same, alone.to_mask(700, 700))


def test_heads_on_several_devices_share_one_density(rng):
    """Heads divided over a mesh axis choose what they would on one device."""
    t = 1024
    q, k = heads(rng, 1, t, t)
    q = q * jnp.asarray([3, 1, 1, 0.2], q.dtype)[:, None]
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, out = jax.sharding.PartitionSpec(None, None, "heads"), jax.sharding.PartitionSpec(None, "heads")
    for question in (None, jnp.full((4,), 30, jnp.int32)):
        per_head = jax.sharding.PartitionSpec("heads")
        sharded = jax.shard_map(
            lambda q, k, density, question: index(q, k, density, question, axis_name="heads"),
            mesh=mesh, in_specs=(spec, spec, per_head, per_head), out_specs=out, check_vma=False,
        )  # fmt: skip
        density = jnp.asarray([0.3, 0.6, jnp.inf, 0.5])
        expected = index(q, k, density, question)
        jax.tree.map(np.testing.assert_array_equal, expected, jax.jit(sharded)(q, k, density, question))


def test_a_head_that_looks_at_the_token_before_sees_it_across_tiles():
    """Only the first row of a query tile needs the tile before, so it has to be among the probes."""
    t = 1280
    angles = np.arange(t)[:, None] * np.linspace(0.3, 3, 16)
    keys = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    q, k = 60 * np.roll(keys, 1, 0)[None, :, None], keys[None, :, None]  # row i asks for key i - 1
    plan = PLAN(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), SharedDensity(0.7, every=16))
    mask = np.asarray(plan.to_mask(t, t))[0, 0]
    assert all(mask[row, row - 1] for row in range(128, t, 128))


def test_a_density_of_one_is_every_tile_where_columns_hold_all_of_some(rng):
    """What is left of such a tile's mass may be less than zero, by rounding: a threshold of 0 leaves no tile out."""
    q = rng.standard_normal((1, 512, 4, 32))
    q, k = 32 * (q[:, :1] + 0.1 * q), rng.standard_normal((1, 512, 2, 32))
    pattern = SharedDensity(1.0, every=16, question=128, threshold=0)
    plan = PLAN(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k)), pattern=pattern)
    np.testing.assert_allclose(plan.density(512, 512), 1, rtol=1e-6)


def test_keys_are_in_the_order_of_worths():
    worth = jnp.asarray([0.0, 1e-30, 2.0**-31, 2.0**-30, 1e-5, 1.001e-5, 0.5, 1.0, 1.1, jnp.inf], jnp.float32)
    keys = np.asarray(tile_keys.level_keys(worth))
    np.testing.assert_array_equal(keys[[0, 1, 2, 3, 7]], [1, 1, 1, 1025, 31 * 1024 + 1])
    assert (np.diff(keys[2:8]) > 0).all() and keys.max() < tile_keys.ALWAYS and keys.min() > tile_keys.NEVER
