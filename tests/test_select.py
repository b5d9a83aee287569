"""Selection without a sort: against a plain NumPy sort, on ties, odd widths, traced counts and special values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.index import select

TOP_K = jax.jit(select.top_k, static_argnums=2)


def numpy_top_k(scores, k):
    """Positions of the k largest, ties to the lower position, ascending; −inf and NaN are never chosen."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[: min(k, np.isfinite(scores).sum() + np.isposinf(scores).sum())])


def check(scores, k, width):
    positions, count = TOP_K(jnp.asarray(scores), jnp.asarray(k, jnp.int32), width)
    for row, wanted, row_positions, row_count in zip(scores, k, np.asarray(positions), np.asarray(count), strict=True):
        expected = numpy_top_k(row, min(max(wanted, 0), width))
        assert row_count == len(expected)
        np.testing.assert_array_equal(row_positions[:row_count], expected)
        np.testing.assert_array_equal(row_positions[row_count:], scores.shape[-1])


def test_a_row_by_hand():
    scores = jnp.asarray([[0.5, 2.0, 0.5, -jnp.inf, 1.0, 0.5]], jnp.float32)
    positions, count = TOP_K(scores, jnp.asarray([4], jnp.int32), 5)
    # 2.0 and 1.0, then the two lowest positions of the three that tie at 0.5.
    np.testing.assert_array_equal(positions, [[0, 1, 2, 4, 6]])
    np.testing.assert_array_equal(count, [4])
    np.testing.assert_array_equal(jax.jit(select.top_k_mask)(scores, jnp.asarray([9], jnp.int32)), scores > -jnp.inf)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100, 1000])
@pytest.mark.parametrize("kind", ["normal", "few values", "all equal", "forced"])
def test_equals_a_stable_sort(rng, size, kind):
    rows = 16
    if kind == "normal":
        scores = rng.standard_normal((rows, size))
    elif kind == "few values":
        scores = rng.integers(-2, 3, (rows, size)) * np.where(rng.random((rows, size)) < 0.5, 1.0, -1.0)
    elif kind == "all equal":
        scores = np.full((rows, size), 0.25)
    else:
        scores = np.where(rng.random((rows, size)) < 0.3, np.inf, rng.random((rows, size)))
        scores = np.where(rng.random((rows, size)) < 0.2, -np.inf, scores)
    check(scores.astype(np.float32), rng.integers(-1, size + 3, rows), max(1, size * 2 // 3))


def test_special_values_and_denormals():
    scores = np.array([[np.nan, 0.0, -0.0, 1e-38, -1e-38, np.inf, -np.inf, np.finfo(np.float32).max]], np.float32)
    for k in range(9):
        check(scores, [k], 8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_scores(rng, dtype):
    scores = jnp.asarray(rng.standard_normal((12, 300)), dtype).at[:, 7].set(jnp.nan).at[:, 9].set(-jnp.inf)
    k = rng.integers(0, 310, 12)
    positions, count = TOP_K(scores, jnp.asarray(k, jnp.int32), 200)
    for row in range(12):
        expected = numpy_top_k(np.asarray(scores[row], np.float32), min(k[row], 200))
        np.testing.assert_array_equal(positions[row, : count[row]], expected)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_threshold_by_digits_of_any_size(rng, bits, monkeypatch):
    monkeypatch.setattr(select, "DIGIT_BITS", bits)
    keys = rng.integers(0, 2**32, (3, 2500), dtype=np.uint32) >> np.uint32(rng.integers(0, 30))
    for k in (1, 17, 2500):
        found = select.kth_largest(jnp.asarray(keys), jnp.full(3, k, jnp.int32))
        np.testing.assert_array_equal(found, np.sort(keys, axis=-1)[:, -k])


def test_as_many_as_hold_enough(rng):
    """The best until they hold the target, but no more than k and no fewer than `least`."""
    scores = rng.random((20, 300)).astype(np.float32)
    mass = (scores * rng.random((20, 300))).astype(np.float32)
    scores[:, 40:43] = np.inf
    target = mass.sum(-1) * rng.random(20).astype(np.float32)
    target[:2] = 0
    k = np.where(np.arange(20) < 15, 300, rng.integers(0, 300, 20)).astype(np.int32)
    enough = select.Enough(jnp.asarray(mass), jnp.asarray(target), least=3)
    positions, count = TOP_K(jnp.asarray(scores), jnp.asarray(k), 300, enough)
    for row in range(20):
        best = np.argsort(-scores[row], kind="stable")
        held = np.cumsum(mass[row, best].astype(np.float64))
        np.testing.assert_array_equal(positions[row, : count[row]], np.sort(best[: count[row]]))
        if count[row] < k[row]:
            assert held[count[row] - 1] >= target[row] * (1 - 1e-5)
        assert count[row] <= max(3, k[row])
        assert count[row] <= 3 or held[count[row] - 2] <= target[row] * (1 + 1e-5)
    assert set(count[:2].tolist()) == {3}


def test_enough_among_equal_scores():
    """Ties hold their mean: the lower positions are taken until that many would reach the target."""
    scores, mass = jnp.asarray([[2.0, 1, 1, 1, 1, 0]]), jnp.asarray([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]])
    for target, expected in ((0.4, [0]), (0.65, [0, 1, 2]), (0.75, [0, 1, 2, 3]), (2.0, list(range(6)))):
        enough = select.Enough(mass, jnp.asarray([target]))
        positions, count = TOP_K(scores, jnp.asarray([6]), 6, enough)
        np.testing.assert_array_equal(positions[0, : count[0]], expected)


def test_compact_and_bitmaps(rng):
    mask = rng.random((5, 77)) < 0.3
    words = jax.jit(select.pack)(jnp.asarray(mask))
    np.testing.assert_array_equal(jax.jit(select.unpack, static_argnums=1)(words, 77), mask)
    positions_of = jax.jit(select.word_positions, static_argnums=(1, 2))
    positions, count = positions_of(words, 40, mask.shape[-1])
    for row in range(5):
        expected = np.flatnonzero(mask[row])
        assert count[row] == len(expected)
        np.testing.assert_array_equal(positions[row, : len(expected)], expected)
    # A width smaller than the number of flags keeps the first ones.
    positions, count = positions_of(words, 4, mask.shape[-1])
    np.testing.assert_array_equal(count, np.minimum(mask.sum(-1), 4))


def test_rows_are_independent_and_vmap_agrees(rng):
    scores, k = rng.random((3, 4, 50)).astype(np.float32), rng.integers(0, 50, (3, 4)).astype(np.int32)
    together = TOP_K(scores, jnp.asarray(k), 50)
    mapped = jax.jit(jax.vmap(lambda s, n: select.top_k(s, n, 50)))(jnp.asarray(scores), jnp.asarray(k))
    jax.tree.map(np.testing.assert_array_equal, together, mapped)
