"""Rows rounded to a byte a number: nothing is lost by turning them, and little by their factors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import relative_error

from minference_jax.models import rounding

quantize_rows = jax.jit(rounding.quantize_rows, static_argnums=1)
turned = jax.jit(rounding.turned)


def back(numbers, scale) -> np.ndarray:
    return np.asarray(numbers, np.float32) * np.asarray(scale, np.float32)[..., None]


def test_turning_two_numbers_gives_their_sum_and_difference():
    np.testing.assert_allclose(turned(jnp.asarray([3.0, 1.0])), np.asarray([4.0, 2.0]) / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize("h", [64, 24, 7])
def test_turning_keeps_products_and_undoes_itself(h, rng):
    q, k = (jnp.asarray(rng.normal(size=(5, h)), jnp.float32) for _ in range(2))
    np.testing.assert_allclose(turned(turned(k)), k, atol=1e-5)
    np.testing.assert_allclose(turned(q) @ turned(k).T, q @ k.T, atol=1e-4)


def test_a_row_of_zeros_and_an_outlier_survive():
    rows = jnp.asarray([[0.0, 0.0], [3e4, -1.0], [1e-30, 5e-31]])
    for dtype, tolerance in ((jnp.float8_e4m3fn, 0.07), (jnp.int8, 0.005)):
        size = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
        assert (jnp.abs(back(*quantize_rows(rows, dtype)) - rows) <= tolerance * size).all()


def test_an_fp8_row_takes_a_better_factor_than_its_largest_number_gives(rng):
    rows = rng.normal(size=(300, 64)).astype(np.float32)
    scale = (np.abs(rows).max(-1) / 448).astype(ml_dtypes.bfloat16)
    plain = (rows / scale.astype(np.float32)[:, None]).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    error, plain_error = (
        np.square(back(*pair) - rows).sum(-1)
        for pair in (quantize_rows(jnp.asarray(rows), jnp.float8_e4m3fn), (plain, scale))
    )
    assert (error <= plain_error * (1 + 1e-5)).all()
    assert error.sum() < 0.8 * plain_error.sum()


def test_scores_of_turned_keys_are_nearer_where_few_channels_are_large(rng):
    # As in trained models: a few channels of keys, and the same of queries, are much larger than the others.
    large = np.where(np.isin(np.arange(64), [5, 17, 30, 44]), 10.0, 1.0)
    q, k = (jnp.asarray(rng.normal(size=(200, 64)) * large, jnp.float32) for _ in range(2))
    for dtype, share in ((jnp.float8_e4m3fn, 0.8), (jnp.int8, 0.6)):
        plain = relative_error(q @ back(*quantize_rows(k, dtype)).T, q @ k.T)
        assert relative_error(turned(q) @ back(*quantize_rows(turned(k), dtype)).T, q @ k.T) < share * plain
