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

from pallas_kernels.index.hopper import hopper_masses
from pallas_kernels.index.tile_lse import MassConfig
from pallas_kernels.index.xla import xla_masses


def run(case: dict) -> None:
    rng = np.random.default_rng(1)
    b, t, s, n, k, h, every = (case[name] for name in ("b", "t", "s", "n", "k", "h", "every"))
    q = jnp.asarray(2 * rng.standard_normal((b, t, n, h)), case["dtype"])
    keys = jnp.asarray(rng.standard_normal((b, s, k, h)), case["dtype"])
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
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for name, case in json.loads(sys.argv[1]).items():
        run(case)
        print(name, "agrees", flush=True)
