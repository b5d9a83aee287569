"""The Hopper kernel on a Hopper GPU, against the oracle and, at lengths too long for it, against exact single rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.bench.shapes import block_bench_plan, exact_row, sample_rows, vertical_slash_bench_plan
from pallas_kernels import plan_builders
from pallas_kernels.hopper import hopper_attention
from pallas_kernels.reference import reference_attention
from tests.plans import random_plan

pytestmark = pytest.mark.gpu

PROBLEM = "no GPU"
if jax.default_backend() == "gpu":
    PROBLEM = "" if str(jax.devices()[0].compute_capability) == "9.0" else "not a Hopper GPU"
if PROBLEM:
    pytest.skip(f"the Hopper kernel needs compute capability 9.0: {PROBLEM}", allow_module_level=True)

CASES = [  # b, t, s, n, k, h, dtype, lengths, q_offset
    (2, 1000, 1000, 4, 1, 128, "bfloat16", [1000, 37], 0),
    (1, 777, 777, 8, 8, 64, "float16", None, 0),
    (3, 300, 940, 8, 1, 128, "float16", [940, 600, 0], 512),
    (2, 700, 700, 4, 2, 96, "bfloat16", [0, 303], 0),
    (1, 1, 1, 1, 1, 128, "bfloat16", None, 0),
]


def inputs(seed, shape, dtype):
    b, t, s, n, k, h = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h))
    return tuple(jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-T{}-S{}-H{}-K{}-D{}-{}".format(*c[:7]))
def test_agrees_with_the_oracle_and_repeats_exactly(case):
    *shape, dtype, lengths, q_offset = case
    b, t, s, n, *_ = shape
    q, k, v = inputs(0, shape, dtype)
    options = {"lengths": None if lengths is None else jnp.asarray(lengths, jnp.int32), "q_offset": jnp.int32(q_offset)}
    plan = random_plan(np.random.default_rng(1), b, n, t, s, columns=90, bands=5, blocks=4)
    run = jax.jit(lambda q, k, v: hopper_attention(q, k, v, plan, **options, return_lse=True))
    run = run.lower(q, k, v).compile()
    # What the outputs will be placed in holds NaN, so that a row that is never written shows.
    poison = jax.block_until_ready([jnp.full(q.shape, jnp.nan, x) for x in (q.dtype, jnp.float32)])
    del poison
    out, lse = run(q, k, v)
    again, lse_again = run(q, k, v)
    expected, expected_lse = reference_attention(
        q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), plan, **options
    )
    error = jnp.linalg.norm((out.astype(jnp.float32) - expected).ravel()) / jnp.linalg.norm(expected.ravel())
    assert float(error) <= 3e-3
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3)
    assert bool((out == again).all()) and bool((lse == lse_again).all())


@pytest.mark.parametrize("length", [1 << 17, 1 << 20])
@pytest.mark.parametrize("pattern", ["vertical_slash", "a_shape", "block_sparse"])
def test_sampled_rows_are_exact_at_long_lengths(length, pattern):
    q, k, v = inputs(2, (1, length, length, 4, 1, 128), "bfloat16")
    if pattern == "a_shape":
        plan = plan_builders.a_shape_plan(1, 4, sink=1024, window=4096)
    elif pattern == "vertical_slash":
        plan = vertical_slash_bench_plan(1, 4, length)
    else:
        plan = block_bench_plan(1, 4, length)
    out, lse = jax.jit(lambda *x: hopper_attention(*x, plan, return_lse=True))(q, k, v)
    for head, row in sample_rows(length, 4, count=8):
        expected, expected_lse = exact_row((q, k, v), plan, 0, head, row)
        actual = np.asarray(out[0, row, head], np.float32)
        assert np.linalg.norm(actual - expected) <= 4e-3 * np.linalg.norm(expected)
        assert abs(float(lse[0, row, head]) - expected_lse) <= 1e-3
