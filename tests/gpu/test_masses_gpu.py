"""Tile masses on a GPU against their twin in jnp, and keys of tiles, whose products are in FP8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tile_masses
from pallas_kernels.device import Device
from pallas_kernels.index import fp8
from pallas_kernels.index.masses import tile_keys, unsupported_reason
from pallas_kernels.index.tile_keys import ALWAYS, NEVER, TileRule

pytestmark = pytest.mark.gpu

T, HEADS, KV_HEADS, EVERY = 8192, 8, 2, 4


def inputs(h, dtype):
    noise = jax.random.split(jax.random.key(h), 3)
    q = jax.random.normal(noise[0], (1, T, HEADS, h), dtype)
    k = jax.random.normal(noise[1], (1, T, KV_HEADS, h), dtype)
    k += 2 * jnp.repeat(jax.random.normal(noise[2], (1, T // 512, KV_HEADS, h), dtype), 512, axis=1)
    reason = unsupported_reason(q, k, device=Device.default())
    if reason is not None:
        pytest.skip(reason)
    rows = jnp.arange(EVERY - 1, T, EVERY, dtype=jnp.int32).reshape(1, T // 128, 128 // EVERY)
    return q, k, rows, jnp.full(rows.shape, EVERY, jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("h", [64, 96, 128, 256])
def test_masses_are_those_of_the_twin(h, dtype):
    arguments, lengths = inputs(h, dtype), jnp.asarray([T - 100], jnp.int32)
    of = [tile_masses(*arguments, lengths=lengths, implementation=name, return_lse=True) for name in ("hopper", "xla")]
    (mass, lse), (expected, expected_lse) = of
    np.testing.assert_allclose(mass / 128, expected / 128, atol=1e-3)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("h", [64, 96, 128])
def test_keys_are_nearly_those_of_exact_masses(h):
    q, k, rows, share = inputs(h, jnp.bfloat16)
    assert fp8.pays_in_fp8(q, k, rows[0].size)
    start, height = 128 * jnp.arange(T // 128, dtype=jnp.int32), jnp.full((1, T // 128), 128, jnp.int32)
    rule = TileRule(start, height, height < 0, jnp.zeros((1, HEADS), jnp.float32))
    where = {"lengths": jnp.asarray([T], jnp.int32), "q_offset": jnp.int32(0), "scale": h**-0.5}
    found, expected = (
        np.asarray(tile_keys(q, k, rows, share, rule, implementation=name, **where), np.int64)
        for name in ("hopper", "xla")
    )
    for level in (NEVER, ALWAYS):
        np.testing.assert_array_equal(found == level, expected == level)
    apart = np.abs(found - expected)[(expected > 1) & (expected < ALWAYS)] / 1024  # octaves
    assert apart.max() < 0.5 and apart.mean() < 0.05
