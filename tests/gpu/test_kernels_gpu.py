"""The attention kernels on a GPU, against the oracle and, at lengths too long for it, against exact single rows.

Every kernel and form that the GPU can run: the Hopper kernel, and the warp-level kernel with copies by cp.async, as
GPUs before Hopper have it, and by TMA.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_qkv, relative_error
from plans import random_plan

from minference_jax.bench.shapes import block_bench_plan, exact_row, sample_rows, vertical_slash_bench_plan
from pallas_kernels import plan_builders, sparse_attention
from pallas_kernels.device import Device
from pallas_kernels.hopper.attention import CAPABILITIES, hopper_attention
from pallas_kernels.mma.attention import mma_attention
from pallas_kernels.mma.config import BLOCK_SHARED_MEMORY, TMA_CAPABILITIES, KernelConfig, default_config
from pallas_kernels.reference import reference_attention

pytestmark = pytest.mark.gpu

DEVICE = Device.default()
if DEVICE.platform != "gpu" or DEVICE.version not in BLOCK_SHARED_MEMORY:
    pytest.skip(f"needs a GPU that the kernels serve: {DEVICE}", allow_module_level=True)


def mma_form(tma: bool, *args, **kwargs):
    """The warp-level kernel, tuned for the oldest GPU that copies so."""
    config = default_config(args[0].shape[-1], min(TMA_CAPABILITIES) if tma else min(BLOCK_SHARED_MEMORY))
    if not config.fits(args[0].shape[-1], DEVICE.version):
        config = KernelConfig(rows=64, step_keys=32, tma=tma)
    return mma_attention(*args, config=config, **kwargs)


FORMS = {"mma-cp.async": partial(mma_form, False)}
if DEVICE.version in TMA_CAPABILITIES:
    FORMS["mma-TMA"] = partial(mma_form, True)
if DEVICE.capability in CAPABILITIES:
    FORMS["hopper"] = hopper_attention
RUN = {
    name: jax.jit(partial(attend, return_lse=True), static_argnames="scale")  # the plan is an argument, see below
    for name, attend in FORMS.items()
}
forms = pytest.mark.parametrize("form", FORMS)

CASES = [  # b, t, s, n, k, h, dtype, lengths, q_offset, scale
    (2, 1000, 1000, 4, 1, 128, "bfloat16", [1000, 37], 0, 1.0),  # running maxima grow by more than 2**8
    (1, 777, 777, 8, 8, 64, "float16", None, 0, 1.0),
    (3, 300, 940, 8, 1, 128, "float16", [940, 600, 0], 512, None),
    (2, 700, 700, 4, 2, 96, "bfloat16", [0, 303], 0, None),
    (1, 1, 1, 1, 1, 128, "bfloat16", None, 0, None),
    (2, 520, 1300, 4, 2, 256, "bfloat16", [1289, 700], 640, None),
    (1, 500, 500, 2, 1, 256, "float16", None, 0, None),
]

# Plans are arguments: of a constant one XLA would compute the tables at compile time, for half a minute.
oracle = jax.jit(reference_attention, static_argnames="scale")


@partial(jax.jit, static_argnums=(1, 2))
def inputs(seed, shape, dtype):
    b, t, s, n, k, h = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h))
    return tuple(jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True))


@forms
@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-T{}-S{}-H{}-K{}-D{}-{}".format(*c[:7]))
def test_agrees_with_the_oracle_and_repeats_exactly(case, form):
    if form == "hopper" and case[5] > 128:
        pytest.skip("the Hopper kernel serves head_dim up to 128")
    *shape, dtype, lengths, q_offset, scale = case
    b, t, s, n, *_ = shape
    q, k, v = inputs(0, tuple(shape), dtype)
    options = {"lengths": None if lengths is None else jnp.asarray(lengths, jnp.int32), "q_offset": jnp.int32(q_offset)}
    plan = random_plan(np.random.default_rng(1), b, n, t, s, columns=90, bands=5, blocks=4)
    compiled = RUN[form].lower(q, k, v, plan, **options, scale=scale).compile()
    # What the outputs will be placed in holds NaN, so that a row that is never written shows.
    poison = jax.block_until_ready([jnp.full(q.shape, jnp.nan, x) for x in (q.dtype, jnp.float32)])
    del poison
    out, lse = compiled(q, k, v, plan, **options)
    again, lse_again = compiled(q, k, v, plan, **options)
    expected, expected_lse = oracle(*(x.astype(jnp.float32) for x in (q, k, v)), plan, **options, scale=scale)
    out, again, expected = (np.asarray(x, np.float32) for x in (out, again, expected))
    assert np.linalg.norm(out - expected) <= 3e-3 * np.linalg.norm(expected)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3)
    np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(lse, lse_again)


def long_plan(pattern, heads, length):
    if pattern == "a_shape":
        return plan_builders.a_shape_plan(1, heads, sink=1024, window=4096)
    build = {"vertical_slash": vertical_slash_bench_plan, "block_sparse": block_bench_plan}
    return build[pattern](1, heads, length)


@forms
@pytest.mark.parametrize("length", [1 << 17, 1 << 20])
@pytest.mark.parametrize("pattern", ["vertical_slash", "a_shape", "block_sparse"])
def test_sampled_rows_are_exact_at_long_lengths(length, pattern, form):
    q, k, v = inputs(2, (1, length, length, 4, 1, 128), "bfloat16")
    plan = long_plan(pattern, 4, length)
    out, lse = RUN[form](q, k, v, plan)
    again, lse_again = RUN[form](q, k, v, plan)
    assert bool((out == again).all() & (lse == lse_again).all())
    for head, row in sample_rows(length, 4, count=8):
        expected, expected_lse = exact_row((q, k, v), plan, 0, head, row)
        actual = np.asarray(out[0, row, head], np.float32)
        assert np.linalg.norm(actual - expected) <= 3e-3 * np.linalg.norm(expected)
        assert abs(float(lse[0, row, head]) - expected_lse) <= 1e-3


@pytest.mark.parametrize("name", ["mma", *(["hopper"] if "hopper" in FORMS else [])])
def test_gradients_agree_with_those_of_jnp(rng, name):
    """The backward pass is the same jnp code; only the output and the LSE that it starts from are the kernel's."""
    q, k, v = random_qkv(rng, 1, 700, 700, 4, 2, 128, "bfloat16")
    plan, lengths = random_plan(rng, 1, 4, 700, 700, columns=40, bands=3, blocks=3), jnp.asarray([650], jnp.int32)

    def loss(implementation):
        def of(q, k, v):
            out = sparse_attention(q, k, v, plan, lengths=lengths, implementation=implementation)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        return jax.jit(jax.grad(of, (0, 1, 2)))

    for found, wanted in zip(loss(name)(q, k, v), loss("xla")(q, k, v), strict=True):
        assert relative_error(found.astype(jnp.float32), wanted.astype(jnp.float32)) < 0.02
