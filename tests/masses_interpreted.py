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
    total = np.maximum(np.where(positions >= 0, share, 0).sum(-1), 1)[:, None, :, None]
    np.testing.assert_allclose(
        mass / total, expected / total, atol=1e-3 if case["config"].get("polynomial_tiles") else 1e-5
    )
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3, rtol=1e-5)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for name, case in json.loads(sys.argv[1]).items():
        run(case)
        print(name, "agrees", flush=True)
