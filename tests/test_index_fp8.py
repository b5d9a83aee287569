"""Probes and keys in FP8: what numbers and factors stand for, and what they do not depend on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.index.fp8 import centred_keys, in_fp8, pays_in_fp8, rounded_probes
from pallas_kernels.index.hopper import hopper_masses, packed
from pallas_kernels.index.tile_keys import TileRule
from pallas_kernels.index.tile_lse import GROUP

STEP = 2.0**-4
"""Of an e4m3 number: the rounding error at most, as a part of it."""


def as_numpy(*arrays):
    return tuple(np.asarray(x, np.float32) for x in arrays)


@pytest.mark.parametrize("h", [64, 96])
def test_keys_are_means_and_rounded_differences(rng, h):
    keys = rng.standard_normal((2, 700, 3, h)) + 50 * rng.standard_normal((2, 1, 3, h))
    k = jnp.asarray(keys, jnp.bfloat16)
    numbers, means, factors = as_numpy(*centred_keys(k, jnp.array([700, 600], jnp.int32), interpret=True))
    group = np.arange(700) // GROUP
    of_key = factors.transpose(0, 2, 1)[:, group, :, None]
    (given,) = as_numpy(k)
    for batch, end in enumerate((700, 600)):
        differences = given[batch, :end] - means[batch, group[:end]]
        error = np.abs(numbers[batch, :end] * of_key[batch, :end] - differences)
        assert (error <= STEP * np.abs(differences) + 2.0**-9 * of_key[batch, :end]).all()
        assert np.abs(numbers[batch, :end]).max() <= 448
        np.testing.assert_array_equal(np.abs(numbers[batch, :GROUP]).max((0, 2)), 448)
        for g in range(2):
            np.testing.assert_allclose(means[batch, g], given[batch, :end][group[:end] == g].mean(0), 0.01, 0.1)


def test_what_lies_after_the_last_key_is_not_looked_at(rng):
    k = jnp.asarray(rng.standard_normal((1, 600, 1, 64)), jnp.bfloat16)
    end = jnp.array([530], jnp.int32)
    expected = as_numpy(*centred_keys(k, end, interpret=True))
    for garbage in (jnp.nan, jnp.inf, 1e30):
        found = as_numpy(*centred_keys(k.at[:, 530:].set(garbage), end, interpret=True))
        np.testing.assert_array_equal(found[0][:, :530], expected[0][:, :530])
        for a, b in zip(found[1:], expected[1:], strict=True):
            np.testing.assert_array_equal(a, b)


def test_probes_are_rounded_and_multiplied_with_the_means(rng):
    b, t, n, kv, h, query_tiles, p, groups = 2, 500, 6, 2, 96, 4, 5, 3
    q = jnp.asarray(rng.standard_normal((b, t, n, h)) * 10.0 ** rng.integers(-2, 3, (b, t, 1, 1)), jnp.bfloat16)
    means = jnp.asarray(rng.standard_normal((b, groups, kv, h)), jnp.bfloat16)
    rows = jnp.asarray(rng.integers(0, t, (b, query_tiles, p)), jnp.int32)
    positions = jnp.full(rows.shape, groups * GROUP - 1, jnp.int32)
    numbers, factors, shift = as_numpy(*rounded_probes(q, means, rows, positions, interpret=True))
    probes, averages = as_numpy(packed(q, rows, kv), means)
    error = np.abs(numbers * factors[..., None] - probes)
    assert (error <= STEP * np.abs(probes) + 2.0**-9 * factors[..., None]).all()
    np.testing.assert_allclose(np.abs(numbers).max(-1), 448)
    expected = np.einsum("bgkh,bkrh->bkgr", averages, probes)
    size = np.einsum("bgkh,bkrh->bkgr", np.abs(averages), np.abs(probes))
    assert (np.abs(shift - expected) <= 1e-5 * size).all()


def test_keys_that_are_all_the_same_are_their_mean():
    k = jnp.full((1, 1024, 1, 64), 0.1, jnp.bfloat16)
    numbers, means, factors = as_numpy(*centred_keys(k, jnp.array([1024], jnp.int32), interpret=True))
    assert not numbers.any() and np.isfinite(factors).all()
    np.testing.assert_array_equal(means, np.float32(k[0, 0, 0, 0]))


@pytest.mark.parametrize("check", [True, False])
def test_keys_may_be_the_same_on_all_devices_where_probes_are_not(rng, check):
    """As with one KV head, whose query heads are spread."""
    q, k = (jnp.asarray(rng.standard_normal((1, 256, heads, 64)), jnp.bfloat16) for heads in (2, 1))
    rows = jnp.asarray([[[3, 100], [130, 255]]], jnp.int32)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))

    def shifts(q, k):
        return in_fp8(q, k, rows, rows, interpret=True)[2].shift

    parts = PartitionSpec(None, None, "heads"), PartitionSpec()
    spread = jax.shard_map(
        shifts, mesh=mesh, in_specs=parts, out_specs=PartitionSpec(None, None, None, "heads"), check_vma=check
    )
    expected = [shifts(q[:, :, i : i + 1], k) for i in range(2)]
    np.testing.assert_array_equal(jax.jit(spread)(q, k), jnp.concatenate(expected, -1))


def test_few_probes_other_numbers_and_what_cannot_be_addressed_stay_as_they_are():
    def pays(tokens, heads, h, probes, dtype="bfloat16"):
        q, k = (jax.ShapeDtypeStruct((1, tokens, n, h), jnp.dtype(dtype)) for n in (32, heads))
        return pays_in_fp8(q, k, probes)

    assert pays(16_384, 8, 128, 2_048)
    assert not pays(16_384, 8, 128, 1_024)
    assert not pays(16_384, 8, 256, 2_048)
    assert not pays(16_384, 8, 128, 2_048, "float16")
    # Pallas's offsets of e4m3 arrays of 2 to 4 GiB are negative.
    assert pays(1 << 20, 16, 128, 8_192) and not pays(1 << 20, 32, 96, 8_192)
    assert not pays(1 << 20, 8, 96, 1 << 20)


def test_devices_of_a_mesh_choose_as_one_does():
    """Each has some of the heads that share keys."""
    rows = jax.ShapeDtypeStruct((1, 128, 16), jnp.int32)
    rule = TileRule(*(jax.ShapeDtypeStruct(shape, kind) for shape, kind in (
        ((128,), jnp.int32), ((1, 128), jnp.int32), ((1, 128), bool), ((1, 1), jnp.float32))))  # fmt: skip
    for heads in (1, 4, 8):
        q, k = (jax.ShapeDtypeStruct((1, 16_384, n, 64), jnp.bfloat16) for n in (heads, 1))
        of_head = rule._replace(threshold=jax.ShapeDtypeStruct((1, heads), jnp.float32))
        share = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
        text = str(jax.make_jaxpr(partial(hopper_masses, scale=0.1))(q, k, rows, rows, share, rule=of_head))
        assert "centred_keys" in text


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_numbers_of_any_size_stay_finite(rng, size):
    q, k = (jnp.asarray(size * rng.standard_normal((1, 256, heads, 64)), jnp.bfloat16) for heads in (2, 1))
    rows = jnp.asarray([[[3, 100], [130, 255]]], jnp.int32)
    probes, keys, factors = in_fp8(q, k, rows, rows, interpret=True)
    for x in (*as_numpy(probes, keys), *as_numpy(*factors[:2])):
        assert np.isfinite(x).all()
    assert np.isfinite(factors.shift).all() or size > 1  # beyond float32
