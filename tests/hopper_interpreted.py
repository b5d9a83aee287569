"""Runs one case of the Hopper kernel in the Mosaic GPU interpreter, with its race detector, in a process of its own.

    PYTHONPATH=.:tests python tests/hopper_interpreted.py '{"b": 1, "t": 130, ...}'

A kernel that forgets an arrival hangs; the caller sets the time limit.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close, random_qkv
from jax.experimental.pallas import mosaic_gpu as plgpu
from plans import random_plan

from pallas_kernels.hopper.attention import hopper_attention
from pallas_kernels.hopper.config import KernelConfig
from pallas_kernels.reference import reference_attention


def main(case: dict) -> None:
    rng = np.random.default_rng(case["seed"])
    b, t, s, n, k, h = (case[name] for name in "btsnkh")
    q, keys, values = random_qkv(rng, b, t, s, n, k, h, case["dtype"])
    plan = random_plan(rng, b, n, t, s, **case["widths"])
    options = {"lengths": None if case["lengths"] is None else jnp.asarray(case["lengths"], jnp.int32)}
    options["q_offset"] = jnp.int32(case["q_offset"])
    options["scale"] = case.get("scale")
    out, lse = hopper_attention(
        q,
        keys,
        values,
        plan,
        **options,
        return_lse=True,
        config=KernelConfig(**case["config"]),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    expected, expected_lse = reference_attention(q, keys, values, plan, **options)
    assert_close(out, expected)
    np.testing.assert_allclose(np.asarray(lse), np.asarray(expected_lse), atol=1e-4)
    print("agrees")


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    main(json.loads(sys.argv[1]))
