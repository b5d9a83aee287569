"""Runs cases of the tile-mass kernel in the Mosaic GPU interpreter, with its race detector, against the jnp twin.

    PYTHONPATH=.:tests python tests/masses_interpreted.py '{"name": {"b": 1, "t": 256, ...}, ...}'

A kernel that forgets an arrival hangs; the caller sets the time limit.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.index import fp8
from pallas_kernels.index.hopper import hopper_masses
from pallas_kernels.index.tile_keys import ALWAYS, NEVER, TileRule
from pallas_kernels.index.tile_lse import MassConfig
from pallas_kernels.index.xla import xla_masses


def check_keys(case: dict, arguments: tuple, options: dict) -> None:
    """Keys of tiles, which the kernel makes of products in FP8: each is worth 2**(1 / 1024) times the one below."""
    (b, t, n, _), (_, query_tiles, _) = arguments[0].shape, arguments[2].shape
    start = jnp.arange(query_tiles, dtype=jnp.int32) * 128
    height = jnp.clip(jnp.asarray(case["valid"], jnp.int32)[:, None] - start, 0, 128)
    end = (height > 0) & (start + 128 >= t)
    rule = TileRule(start + jnp.int32(case["q_offset"]), height, end, jnp.zeros((b, n), jnp.float32))
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    found = hopper_masses(*arguments, **options, rule=rule, config=MassConfig(**case["config"]), interpret=interpret)
    found, expected = (np.asarray(x, np.int64) for x in (found, xla_masses(*arguments, **options, rule=rule)))
    assert found.shape == expected.shape
    for level in (NEVER, ALWAYS):
        np.testing.assert_array_equal(found == level, expected == level)
    ranked = (expected > 1) & (expected < ALWAYS)
    assert ranked.any()
    apart = np.abs(found - expected)[ranked]
    assert apart.max() < 1024 * case["octaves_apart"] and apart.mean() < 1024 * 0.05, (apart.max(), apart.mean())


def run(case: dict) -> None:
    rng = np.random.default_rng(1)
    b, t, s, n, k, h, every = (case[name] for name in ("b", "t", "s", "n", "k", "h", "every"))
    q = jnp.asarray(2 * rng.standard_normal((b, t, n, h)), case["dtype"])
    # Keys of a group of 512 differ from others by what they have in common and by their size.
    groups = np.arange(s) // 512
    common = case.get("common", 0) * rng.standard_normal((1, 9, k, h))[:, groups]
    size = rng.uniform(0.3, 1, (1, 9, k, 1))[:, groups] if common.any() else 1
    keys = jnp.asarray(size * rng.standard_normal((b, s, k, h)) + common, case["dtype"])
    octaves = np.zeros((s, k))
    for head, heights in enumerate(case.get("octaves", [])):  # 2**height is a factor of the key's weight
        octaves[[int(at) for at in heights], head] = list(heights.values())
    if octaves.any():
        q = q.at[..., 0].set(16)
        keys = keys.at[..., 0].set(jnp.asarray(octaves * np.log(2) * h**0.5 / 16, keys.dtype))
    rows = 128 * np.arange(-(-t // 128))[:, None] + np.arange(0, 128, every) + rng.integers(every)
    rows = jnp.asarray(np.broadcast_to(rows, (b, *rows.shape)), jnp.int32)
    valid = np.asarray(case["valid"])[:, None, None]
    positions = jnp.where(rows < valid, rows + jnp.int32(case["q_offset"]), -1)
    share = jnp.asarray(rng.integers(1, 2 * every, rows.shape), jnp.float32)
    arguments = (q, keys, rows, positions, share)
    options = {"scale": case.get("scale", h**-0.5)}
    if "octaves_apart" in case:
        return check_keys(case, arguments, options)
    mass, lse = hopper_masses(
        *arguments,
        **options,
        config=MassConfig(**case["config"]),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    expected, expected_lse = xla_masses(*arguments, **options)
    shares = np.where(positions >= 0, share, 0).sum(-1)[:, None, :, None]
    total = np.maximum(shares, 1)
    weights, expected = np.asarray(mass) / total, np.asarray(expected) / total
    for found in (weights, expected):
        np.testing.assert_allclose(
            found.sum(-1, keepdims=True), np.broadcast_to(shares > 0, (b, n, rows.shape[1], 1)), rtol=1e-4
        )
    told_apart = n
    if "beyond" in case:  # scores of the last KV head differ by more than the kernel tells apart
        told_apart -= n // k
        assert np.isfinite(lse).all()
        np.testing.assert_allclose(weights[:, told_apart:, -1, case["beyond"]].sum(-1), 1, rtol=1e-5)
    atol = 1e-3 if case["config"].get("polynomial_tiles", 2) else 1e-5
    np.testing.assert_allclose(weights[:, :told_apart], expected[:, :told_apart], atol=atol)
    np.testing.assert_allclose(lse[:, :told_apart], expected_lse[:, :told_apart], atol=1e-3, rtol=1e-5)


if __name__ == "__main__":
    fp8.FEWEST = 1  # however few probes there are
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    # The interpreter's threads call JAX. What is queued beside them may hold all threads that would answer.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    for name, case in json.loads(sys.argv[1]).items():
        run(case)
        print(name, "agrees", flush=True)
