"""The vertical-slash index against the plain NumPy statement of the original's rule, and the tile rule's properties."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_index
import pytest

from minference_jax.attention import make_plan
from minference_jax.index import tile_budget, tiles, vertical_slash
from minference_jax.index.select import unpack
from minference_jax.index.weights import lazy_weights
from minference_jax.patterns import VerticalSlash, layer_patterns
from minference_jax.patterns.base import Where

PLAN = jax.jit(make_plan, static_argnames=("pattern",))


def listed(part, count, row, head):
    return np.asarray(part[row, head, : int(count[row, head])])


def test_selection_equals_the_original_on_500_cases(rng):
    """Given scores, odd lengths and budgets: one compiled program, lengths traced."""
    s, rows = 330, 500
    columns, slashes = rng.integers(0, s + 20, rows), rng.integers(0, s + 20, rows)
    length = rng.integers(1, s + 1, rows)
    sums = rng.random((rows, s)).astype(np.float32) ** 4
    sums[::3] = np.round(sums[::3] * 4) / 4  # many ties
    arguments = (jnp.asarray(x, jnp.int32) for x in (columns, slashes, length))

    @jax.jit
    def choose(sums, columns, slashes, length):
        return (
            unpack(vertical_slash.column_words(sums, columns, length), s),
            unpack(vertical_slash.slash_lines(sums, slashes, length), s),
        )

    chosen_columns, chosen_lines = map(np.asarray, choose(jnp.asarray(sums), *arguments))
    for i in range(rows):
        expected = numpy_index.official_columns(sums[i], columns[i], length[i])
        np.testing.assert_array_equal(np.flatnonzero(chosen_columns[i]), expected)
        expected = numpy_index.official_slashes(sums[i], slashes[i], length[i])
        np.testing.assert_array_equal(np.flatnonzero(chosen_lines[i]), expected)


def test_whole_index_equals_the_original_on_padded_batches(rng):
    """Scores included, from q and k: 128 heads of odd lengths, two sequences shorter than the probes among them."""
    b, t, n, kv, h = 16, 300, 4, 2, 16
    pattern = VerticalSlash(columns=40, slashes=60)
    for offset in (0, 256):
        s = offset + t
        q = (2 * rng.standard_normal((b, t, n, h))).astype(np.float32)
        k = rng.standard_normal((b, s, kv, h)).astype(np.float32)
        lengths = rng.integers(offset + 1, s + 1, b).astype(np.int32)
        lengths[:2] = offset + 1, offset + 50
        plan = PLAN(jnp.asarray(q), jnp.asarray(k), pattern, lengths=jnp.asarray(lengths), q_offset=offset)
        plan = jax.tree.map(np.asarray, plan)
        for i in range(b):
            for head in range(n):
                expected, lines = numpy_index.vertical_slash(
                    q[i, :, head], k[i, :, head // 2], 40, 60, lengths[i], offset
                )
                np.testing.assert_array_equal(listed(plan.columns, plan.column_count, i, head), expected)
                bands = listed(plan.bands, plan.band_count, i, head)
                np.testing.assert_array_equal(bands, numpy_index.bands_of_lines(lines))


def test_weights_by_key_and_by_distance(rng):
    """Sums over the probes, against NumPy; probes anywhere, one of them without a position."""
    rows = np.sort(rng.choice(100, 64, replace=False))
    scores = rng.standard_normal((64, 100)).astype(np.float32)
    positions = jnp.asarray(np.where(np.arange(64) == 5, -1, rows), jnp.int32)
    weights = np.exp(scores * 2) * (np.arange(100) <= rows[:, None])
    weights = weights / weights.sum(-1, keepdims=True) * (np.arange(64) != 5)[:, None]
    found = lazy_weights(jnp.asarray(scores), 2.0, positions)
    np.testing.assert_allclose(found.sum_by_key(), weights.sum(0), rtol=1e-5, atol=1e-7)
    for skip in (0, 30):
        expected = numpy_index.diagonal_sums(weights * (np.arange(100) >= skip), rows)
        np.testing.assert_allclose(found.sum_by_distance(skip), expected, rtol=1e-5, atol=1e-6)


def test_mass_that_bands_capture():
    """Mass at one distance, against a walk through the 128 rows of a query tile."""
    s = 400
    captured = tiles.band_scores(jnp.eye(s, dtype=jnp.float32))
    for distance in range(0, s, 7):
        expected = [numpy_index.captured_share(64 * band, distance) for band in range(captured.shape[-1])]
        np.testing.assert_allclose(captured[distance], expected, atol=1e-6)


def planted(rng, s, n, column, distance):
    """q, k in which every query attends to one column (even heads) or to one distance (odd heads)."""
    h = 64
    q, k = np.zeros((1, s, n, h), np.float32), np.zeros((1, s, n, h), np.float32)
    codes = rng.choice([-1.0, 1.0], (s + distance, h)).astype(np.float32)
    k[0, :, 1::2] = codes[:s, None]
    q[0, distance:, 1::2] = 2 * codes[: s - distance, None]
    k[0, column, 0::2], q[0, :, 0::2] = 2.0, 2.0
    return jnp.asarray(q), jnp.asarray(k)


@pytest.mark.parametrize("probes", ["last", "spread"])
@pytest.mark.parametrize(("column", "distance"), [(100, 900), (777, 333), (1300, 1500)])
def test_planted_columns_and_slashes_are_found(rng, probes, column, distance):
    q, k = planted(rng, 2048, 4, column, distance)
    plan = PLAN(q, k, VerticalSlash(columns=64, tiles=10, probes=probes))
    for head in (0, 2):
        assert column in listed(plan.columns, plan.column_count, 0, head)
    for head in (1, 3):
        wanted = {band for band in range(64, 2048, 64) if numpy_index.captured_share(band, distance) > 0}
        assert wanted <= set(listed(plan.bands, plan.band_count, 0, head))


@pytest.mark.parametrize(
    "pattern",
    [
        VerticalSlash(columns=20, slashes=60),
        VerticalSlash(columns=20, slashes=60, probes="spread"),
        VerticalSlash(columns=20, tiles=2, probes="spread"),
        VerticalSlash(columns=20, tiles=3, coverage=0.8),
        VerticalSlash(columns=10, tiles=1, probes="spread", threshold=0.004),
    ],
    ids=["lines", "spread lines", "tiles", "coverage", "threshold"],
)
def test_padded_batch_equals_each_sequence_alone_and_vmap(rng, pattern):
    lengths = np.array([448, 190, 64, 1], np.int32)
    q = jnp.asarray(rng.standard_normal((4, 448, 4, 16)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((4, 448, 2, 16)), jnp.float32)
    together = PLAN(q, k, pattern, lengths=jnp.asarray(lengths))
    one = jax.vmap(lambda q, k, length: make_plan(q[None], k[None], pattern, lengths=length[None]))
    mapped = jax.tree.map(lambda x: x[:, 0], one(q, k, jnp.asarray(lengths)))
    jax.tree.map(np.testing.assert_array_equal, together, mapped)
    for i in (1, 2) if pattern.slashes == 60 and pattern.probes == "last" else (1,):  # 64: as many rows as probes
        end = int(lengths[i])
        alone = PLAN(q[i : i + 1, :end], k[i : i + 1, :end], pattern)
        for head in range(4):
            for name, count in (("columns", "column_count"), ("bands", "band_count")):
                np.testing.assert_array_equal(
                    listed(getattr(together, name), getattr(together, count), i, head),
                    listed(getattr(alone, name), getattr(alone, count), 0, head),
                )


@pytest.mark.parametrize("heads_that_fit", [2, 8], ids=["two heads", "two sequences"])
def test_heads_and_sequences_can_be_taken_a_few_at_a_time(rng, monkeypatch, heads_that_fit):
    """The loop that bounds memory changes nothing."""
    q = jnp.asarray(rng.standard_normal((4, 256, 4, 16)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((4, 256, 4, 16)), jnp.float32)
    budgets = layer_patterns(VerticalSlash(columns=20, tiles=2), 4).budgets[0]
    where = Where(jnp.full((4,), 256, jnp.int32), jnp.int32(0), 0.25, None)

    def traced():  # the limit is read while tracing, and a new function is traced anew
        return jax.jit(lambda q, k: budgets.index(q, k, where)).trace(q, k)

    whole = traced()
    monkeypatch.setattr(vertical_slash.probes, "SCORE_BYTES", heads_that_fit * 64 * 256 * 4)
    some = traced()
    assert str(some.jaxpr) != str(whole.jaxpr)
    jax.tree.map(np.testing.assert_array_equal, *(one.lower().compile()(q, k) for one in (whole, some)))


def test_shard_map_over_heads(rng):
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    q = jnp.asarray(rng.standard_normal((1, 256, 4, 16)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((1, 256, 2, 16)), jnp.float32)
    pattern = VerticalSlash(columns=20, tiles=2, probes="spread")
    spec = jax.sharding.PartitionSpec(None, None, "heads")
    out = jax.sharding.PartitionSpec(None, "heads")
    sharded = jax.shard_map(
        lambda q, k: make_plan(q, k, pattern), mesh=mesh, in_specs=(spec, spec), out_specs=out, check_vma=False
    )
    jax.tree.map(np.testing.assert_array_equal, PLAN(q, k, pattern), jax.jit(sharded)(q, k))


def test_coverage_shrinks_counts_only(rng):
    q, k = planted(rng, 1024, 2, 100, 500)
    full = PLAN(q, k, VerticalSlash(columns=200, tiles=8))
    less = PLAN(q, k, VerticalSlash(columns=200, tiles=8, coverage=0.9))
    assert full.columns.shape == less.columns.shape
    assert full.bands.shape == less.bands.shape
    assert int(less.band_count[0, 1]) < int(full.band_count[0, 1])
    assert 100 in listed(less.columns, less.column_count, 0, 0)


def test_threshold_gives_wide_heads_more(rng):
    """A head that attends to one column stays at its budgets; one that attends to everything goes up to the limit."""
    q, k = planted(rng, 1024, 4, 3, 500)
    q = q.at[:, :, 2:].set(0)  # two heads of uniform attention, at a mean weight above 1/1024
    plan = PLAN(q, k, VerticalSlash(columns=12, tiles=1, probes="spread", threshold=4e-4))
    np.testing.assert_array_equal(plan.column_count[0, 2:], 8 * 12)
    assert int(plan.band_count[0, 0]) == 1
    assert int(plan.column_count[0, 0]) <= 12
    fewer = PLAN(q, k, VerticalSlash(columns=12, tiles=1, probes="spread", threshold=0.5))
    np.testing.assert_array_equal(fewer.band_count[0], 1)
    np.testing.assert_array_equal(fewer.column_count[0, 2:], 12)


def test_tile_budget():
    """Near what the original's lines took on text: see the function's table."""
    assert [tile_budget(lines) for lines in (0, 100, 128, 512, 2048)] == [1, 2, 8, 33, 85]
    assert tile_budget(2048, tokens=4096) == 64
    with pytest.raises(ValueError, match="slashes"):
        tile_budget(-1)
