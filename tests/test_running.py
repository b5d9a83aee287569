"""Kernels of one thread block between other kernels (interpreted): against what they stand for in jnp."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.index import level
from pallas_kernels import order
from pallas_kernels.index import running


def tiles_of(rng):
    """Keys of two sequences with three heads each, many of them equal, and cells of which tiles have few or all."""
    keys = rng.choice([0, 1, 127, 128, 5000, 5001, 5130, 0x7FFE, 0x7FFF], (2, 3, 5, 37)).astype(np.uint16)
    rows = rng.integers(0, 129, (2, 5))
    return jnp.asarray(keys), jnp.asarray(rng.integers(0, 65, (2, 3, 37)), jnp.int32), jnp.asarray(rows, jnp.int32)


def counts_in_parts(keys, rows, open_keys, prefix, *, shift, bits):
    """`digit_counts`, a part for each query tile."""
    wide = keys.astype(jnp.int32)
    cells = rows[:, None, :, None] * (1 if open_keys is None else open_keys[:, :, None])
    if prefix is not None:
        cells = jnp.where(wide >> (shift + bits) == prefix[:, None, None, None], cells, 0)
    digit = (wide >> shift) & ((1 << bits) - 1)
    flags = (digit[..., None] == jnp.arange(1 << bits)) & (digit[..., None] > 0)
    return jnp.where(flags, jnp.broadcast_to(cells, digit.shape)[..., None], 0).sum((1, 3))


@pytest.mark.parametrize("columns", [False, True])
def test_two_digits_are_the_level_that_sums_find(rng, monkeypatch, columns):
    keys, open_keys, rows = tiles_of(rng)
    open_keys = open_keys if columns else None
    monkeypatch.setattr(level, "digit_counts", counts_in_parts)
    monkeypatch.setattr(level, "best_digit", partial(running.best_digit, interpret=True))
    monkeypatch.setattr(running, "AT_ONCE", 64)  # one or two parts at once
    every = float(keys.size * 64) * (32 if columns else 1)
    find = jax.jit(lambda form, most: form(keys, open_keys, rows, most, None), static_argnums=0)
    found = []
    for share in (0.0, 0.02, 0.2, 0.35, 0.5, 0.7, 2.0):
        most = jnp.asarray([share * every / 2, share * every / 3], jnp.float32)
        level_of_sums = find(level._level_by_sums, most)
        np.testing.assert_array_equal(find(level._level_by_counts, most), level_of_sums)
        found += list(np.asarray(level_of_sums))
    assert len(set(found)) > 4 and min(found) == 0 and max(found) == level.ALWAYS - 1


@pytest.mark.parametrize("unit", [1, 64])
def test_tied_tiles_are_taken_in_order_as_long_as_they_fit(rng, monkeypatch, unit):
    above = jnp.asarray(rng.integers(0, 9, (2, 5, 7)), jnp.int32)
    reached = above + jnp.asarray(rng.integers(0, 5, above.shape), jnp.int32)
    rows = jnp.asarray([[128, 128, 0, 128, 77, 1, 128], [0] * 7], jnp.int32)
    most = jnp.asarray([unit * 25.0 * int(rows[0].sum()), 0.0])
    monkeypatch.setattr(running, "AT_ONCE", 8)
    options = {"unit": unit, "width": 37}
    expected = np.asarray(level._tied_tiles(above, reached, rows, most, **options))
    assert {0, 37} <= set(expected[0].ravel()) and (expected[0] > 0).any()
    found = jax.jit(partial(running.tied_tiles, interpret=True, **options))(above, reached, rows, most)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("at_once", [8, 1024])
def test_the_order_of_a_kernel_is_that_of_sums(rng, at_once):
    steps = rng.integers(0, 3, (5, 37))
    steps[0, 36], steps[3, 5], steps[4, 0] = 900, 70, 65
    steps = jnp.asarray(np.repeat(steps, 20, axis=0).ravel(), jnp.int32)
    found = jax.jit(partial(order.in_one_block, at_once=at_once, interpret=True))(steps)
    np.testing.assert_array_equal(found, order.in_jnp(steps))
    assert not np.array_equal(found, np.arange(steps.size))
