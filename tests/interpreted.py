"""Runs cases of a GPU's kernel in the Mosaic GPU interpreter, with its race detector, in a process of their own.

The padding of keys and values is NaN.

    PYTHONPATH=. python tests/interpreted.py hopper [CASE ...]

Without names, all cases. A kernel that forgets an arrival hangs; the caller sets the time limit.
"""

import sys

import jax
import jax.numpy as jnp
from backend_cases import UNDER_TEST, UnderTest
from helpers import assert_close, assert_lse_close
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.reference import reference_attention


def main(backend: str, *names: str) -> None:
    (tested,) = (tested for tested in UNDER_TEST if tested.name == backend)
    for name in names or tested.kernel_cases():
        run(tested, name)


def run(tested: UnderTest, name: str) -> None:
    assert tested.interpreted is not None
    case, config = tested.interpreted.cases[name]
    *arrays, lengths, q_offset = case.arguments(seed=1)
    options = {"lengths": lengths, "q_offset": q_offset, "scale": case.scale}
    q, k, v, plan = arrays
    padding = (jnp.arange(case.s, dtype=jnp.int32) >= lengths[:, None])[..., None, None]
    k, v = (jnp.where(padding, jnp.nan, x) for x in (k, v))
    out, lse = tested.interpreted.attend(
        *(q, k, v, plan),
        **options,
        return_lse=True,
        config=tested.interpreted.config(**config),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    expected, expected_lse = reference_attention(*arrays, **options)
    assert_close(out, expected)
    assert_lse_close(lse, expected_lse)
    print(name, "agrees", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    main(*sys.argv[1:])
