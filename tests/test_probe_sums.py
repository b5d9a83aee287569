"""Sums over the probes' weights: the kernels (interpreted) against the plain form, and where programs hold them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from minference_jax.index import weights
from pallas_kernels.device import Device
from pallas_kernels.index.probe_sums import Tile, row_totals, unsupported_reason, weight_sums
from pallas_kernels.tracing import under_own_settings


def sums(scores, positions, importance):
    found = weights.lazy_weights(scores, 0.7, positions, importance)
    return found.by_key(), found.sum_by_key(), found.sum_by_distance(0), found.sum_by_distance(40)


def probes_of(rng, dtype, s):
    """Of two sequences with three heads each: six probes anywhere, some that are none, some that do not count."""
    positions = rng.integers(0, s, (2, 3, 6))
    positions[0, 0, :3] = s - 1, 0, 63  # 63: the last of a thread block's keys
    positions[rng.random(positions.shape) < 0.2] = -1
    importance = rng.choice([0.0, 0.3, 1.0], positions.shape)
    scores = 5 * rng.standard_normal((*positions.shape, s))
    return jnp.asarray(scores, dtype), jnp.asarray(positions, jnp.int32), jnp.asarray(importance, jnp.float32)


# Pieces have 64 keys. Rows are odd, end within a piece after whole loads of 16 bytes, or have whole pieces.
@pytest.mark.parametrize(
    ("dtype", "s", "mapped"), [("bfloat16", 136, False), ("float16", 129, True), ("float32", 128, False)]
)
def test_a_kernel_gives_what_the_plain_form_gives(rng, monkeypatch, dtype, s, mapped):
    arrays = probes_of(rng, dtype, s)
    expected = jax.jit(sums)(*arrays)
    for name, kernel, tile in (("row_totals", row_totals, Tile(2, 1)), ("weight_sums", weight_sums, Tile(2, 1, 4))):
        monkeypatch.setattr(weights, name, partial(kernel, tile=tile, interpret=True))
    monkeypatch.setattr(weights, "_either", lambda kernel, plain, factor, *arrays: kernel(*arrays))
    found = jax.jit(jax.vmap(sums) if mapped else lambda *y: sums(*y))(*arrays)
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape and got.dtype == jnp.float32
        assert_close(got, want)


def test_rows_that_see_nothing_and_scores_that_are_not_finite():
    scores = np.zeros((4, 70), np.float32)
    scores[1, 3], scores[2, 60], scores[3, 5] = np.inf, -np.inf, np.nan
    positions = jnp.asarray([-1, 69, 69, 69])
    top, total = row_totals(jnp.asarray(scores), positions, 1.0, tile=Tile(2, 1), interpret=True)
    np.testing.assert_array_equal(top, [0, 0, 0, 0])
    np.testing.assert_array_equal(total, [0, np.inf, 69, np.nan])


def test_what_the_kernels_cannot_serve_they_refuse():
    rows, heads = jnp.zeros((0, 8)), jnp.zeros((1, 2, 8), jnp.float8_e4m3fn)
    none, two = jnp.zeros((0,), jnp.int32), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"row_totals: there is nothing in scores of shape \(0, 8\)"):
        row_totals(rows, none, 1.0)
    with pytest.raises(ValueError, match=r"weight_sums: .*scores are float8_e4m3fn"):
        weight_sums(heads, two, two.astype(jnp.float32), 1.0)
    assert "factor above zero" in str(unsupported_reason(jnp.zeros((1, 8)), 0.0))


def test_the_kernels_under_shard_map_and_grad(rng, monkeypatch):
    """Traced with the plain form beside them, which is what runs here: whatever the caller's settings."""

    def value(scores, positions, importance):
        found = sums(scores, positions, importance)
        return sum(jnp.sum(y * y) for y in found), found

    arrays = probes_of(rng, "float32", 64)
    gradient = jax.jit(jax.grad(jax.jit(under_own_settings(value)), has_aux=True))
    expected = gradient(*arrays)
    monkeypatch.setattr(Device, "default", staticmethod(lambda: Device("gpu", "9.0")))
    mesh = jax.make_mesh((2,), ("head",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("head")
    with jax.numpy_rank_promotion("raise"):
        found = jax.jit(jax.shard_map(lambda *y: gradient(*y), mesh=mesh, in_specs=spec, out_specs=spec))(*arrays)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got, want)
