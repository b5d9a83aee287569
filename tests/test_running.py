"""Small kernels between other kernels (interpreted): against what they stand for in jnp."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.index import level
from pallas_kernels import order
from pallas_kernels.index import normalise, running
from pallas_kernels.index.tile_keys import TileRule


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


def test_logarithms_become_masses_and_keys_of_what_rows_see(rng, monkeypatch):
    """Several chunks, three probes a tile, widths that nothing divides; NaN where nothing is defined."""
    monkeypatch.setattr(normalise, "AT_ONCE", 128)
    b, kv_heads, group, i, per_tile, keys, chunk = 2, 2, 3, 3, 3, 2900, 1024
    positions = rng.integers(0, keys, (b, i, per_tile))
    positions[0, 1] = -1
    positions[1, 2] = keys - 1, -1, 0
    share = jnp.asarray(rng.integers(1, 9, (b, i, per_tile)), jnp.float32)
    of_rows = np.repeat(positions[:, :, None], group, axis=2).reshape(b, 1, -1, 1)
    terms = rng.exponential(size=(b, kv_heads, of_rows.shape[2], 48)) * (64 * np.arange(48) <= of_rows)
    sums = np.stack([terms[..., first : first + 16].sum(-1) for first in (0, 16, 32)], 2)
    with np.errstate(divide="ignore"):
        tiles, chunks = (np.where(x > 0, np.log2(x), np.nan).astype(np.float32) for x in (terms, sums))
    start, rows = jnp.asarray([512, 1024, 2816], jnp.int32), jnp.asarray([[128, 0, 84], [128, 128, 128]], jnp.int32)
    threshold = jnp.asarray(rng.choice([0, 1e-4, 1e-3, np.inf], (b, kv_heads * group)), jnp.float32)
    rule = TileRule(start, rows, jnp.asarray([[False, False, True], [False, False, True]]), threshold)
    arrays = (jnp.asarray(tiles), jnp.asarray(chunks), jnp.asarray(of_rows[:, 0, :, 0], jnp.int32), share)
    run = jax.jit(partial(normalise.normalised, heads=kv_heads * group, keys=keys, chunk=chunk, interpret=True))
    mass, lse = run(*arrays, None)
    total = terms.sum(-1, keepdims=True)
    shape = (b, kv_heads, i, group, per_tile)
    weights = (terms / np.where(total > 0, total, 1)).reshape(*shape, -1) * np.asarray(share)[:, None, :, None, :, None]
    expected = weights.sum(-2).swapaxes(2, 3).reshape(b, kv_heads * group, i, -1)[..., :46]
    np.testing.assert_allclose(mass, expected, rtol=1e-4, atol=1e-7)
    with np.errstate(divide="ignore"):
        expected = np.log(total).reshape(shape).swapaxes(2, 3).reshape(b, kv_heads * group, i, per_tile)
    np.testing.assert_allclose(lse, expected, rtol=1e-5, atol=1e-6)
    (found,) = run(*arrays, rule)
    np.testing.assert_array_equal(found, jax.jit(lambda mass: rule.keys(mass))(mass))
    assert found.dtype == jnp.uint16 and {0, 0x7FFF} < set(np.asarray(found).ravel().tolist())
