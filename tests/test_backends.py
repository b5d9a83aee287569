"""One contract for all backends of attention: the oracle's numbers on every call that a backend says it serves.

A backend that a CPU runs is run. A GPU's kernel is lowered for CUDA on the same calls, and a few of them run in the
interpreter. `backend_cases.py` has the calls and the backends.
"""

import dataclasses
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_cases import CASES, ODD, UNDER_TEST, Case, UnderTest
from helpers import GRADIENT_ATOL, assert_close, assert_lse_close, random_qkv
from jax.sharding import AxisType, PartitionSpec
from plans import int32, random_plan

from pallas_kernels import (
    SparsePlan,
    a_shape_attention,
    block_sparse_attention,
    dense_attention,
    sparse_attention,
    vertical_slash_attention,
)
from pallas_kernels.backends import SPARSE_BACKENDS
from pallas_kernels.device import Device
from pallas_kernels.plan_builders import a_shape_plan

ORACLE = "reference"
RUN_HERE = [tested for tested in UNDER_TEST if tested.interpreted is None]
KERNELS = [tested for tested in UNDER_TEST if tested.interpreted is not None]


def names(tested: UnderTest) -> str:
    return tested.name


run_here = pytest.mark.parametrize("name", [tested.name for tested in RUN_HERE])


@cache
def attend(name: str, scale: float | None = None):
    """A backend's attention with its log-sum-exp, compiled once for each shape."""

    def run(q, k, v, plan, lengths, q_offset):
        options = {"lengths": lengths, "q_offset": q_offset, "scale": scale}
        return sparse_attention(q, k, v, plan, implementation=name, return_lse=True, **options)

    return jax.jit(run)


def lowered(name: str, case: Case, *arguments) -> str:
    avals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    return attend(name, case.scale).trace(*avals).lower(lowering_platforms=("cuda",)).as_text()


def test_every_backend_is_in_the_suite():
    assert {tested.name for tested in UNDER_TEST} | {ORACLE} == {backend.name for backend in SPARSE_BACKENDS}


@pytest.mark.parametrize("tested", UNDER_TEST, ids=names)
def test_a_backend_says_what_it_serves(tested):
    for name, case in CASES.items():
        q, k, v, plan, *_ = jax.eval_shape(case.arguments)
        for what in (plan, None):
            reason = tested.backend.unsupported_reason(q, k, v, what, device=None)
            assert (reason is None) == tested.serves(case), (name, reason)
    q, k, v, plan, *_ = jax.eval_shape(CASES["bfloat16"].arguments)
    reason = tested.backend.unsupported_reason(q, k, v, plan, device=Device("cpu"))
    assert reason == (None if tested.interpreted is None else "the default device is cpu, not a GPU")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@run_here
def test_equals_the_oracle(name, case):
    arguments = case.arguments()
    out, lse = attend(name, case.scale)(*arguments)
    expected, expected_lse = attend(ORACLE, case.scale)(*arguments)
    assert out.dtype == case.dtype and lse.dtype == jnp.float32
    assert_close(out, expected)
    assert_lse_close(lse, expected_lse)
    padded = case.q_offset + np.arange(case.t) >= np.asarray(arguments[4])[:, None]
    assert (np.asarray(out, np.float32)[padded] == 0).all() and np.isneginf(np.asarray(lse)[padded]).all()


SHAPES = {case.shape: case for case in CASES.values()}.values()  # one case for each program
LOWERED = [(tested.name, case) for tested in KERNELS for case in SHAPES if tested.serves(case)]


@pytest.mark.parametrize("name, case", LOWERED)
def test_lowers_for_cuda_without_a_gpu(name, case):
    assert "mosaic_gpu" in lowered(name, case, *jax.eval_shape(case.arguments))


@pytest.mark.parametrize("part", ["first", "rest"])
@pytest.mark.parametrize("tested", KERNELS, ids=names)
def test_interpreted_kernel_equals_the_oracle_and_is_free_of_races(tested, part):
    """The cases of a kernel in one process, which takes seconds to start: the first, and all others."""
    cases = tested.kernel_cases()[:1] if part == "first" else tested.kernel_cases()[1:]
    root = Path(__file__).parents[1]
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(root))
    command = [sys.executable, "-W", "ignore", str(root / "tests" / "interpreted.py"), tested.name, *cases]
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, (run.stdout, run.stderr[-2000:])
    assert run.stdout.splitlines() == [f"{name} agrees" for name in cases]
    assert "RACE" not in run.stdout + run.stderr


@pytest.mark.parametrize("part", ["columns", "bands", "blocks", "none"])
@run_here
def test_each_part_alone(name, part):
    q, k, v, full, lengths, q_offset = ODD.arguments()
    counts = {"columns": "column_count", "bands": "band_count", "blocks": "block_count"}
    plan = SparsePlan(**{field: getattr(full, field) for field in ((part, counts[part]) if part != "none" else ())})
    out, _ = attend(name)(q, k, v, plan, lengths, q_offset)
    assert_close(out, attend(ORACLE)(q, k, v, plan, lengths, q_offset)[0])


@run_here
def test_lists_out_of_order_are_read_by_the_rule(name):
    """Columns and blocks that are less than one before them do not count, wherever the plan is read."""
    q, k, v, plan, lengths, q_offset = ODD.arguments()
    shuffled = dataclasses.replace(plan, columns=plan.columns[..., ::-1], blocks=plan.blocks[..., ::-1])
    out, _ = attend(name)(q, k, v, shuffled, lengths, q_offset)
    assert_close(out, attend(ORACLE)(q, k, v, shuffled, lengths, q_offset)[0])


# Three query tiles (rows) of 128 and six key tiles of 64: '/' the causal part of a tile, '1' all of it, 'c' its key 6.
PICTURES = {
    "a-shape, sink of 64, window of 65": (
        partial(a_shape_attention, sink=64, window=65),
        ["//....", "11//..", "1..1//"],
    ),
    # The line at distance 192 shows the rows from q0 the keys q0 - 192 to q0 - 65: two tiles.
    "vertical-slash, column 70, line 192": (
        partial(vertical_slash_attention, columns=int32([[[70]]]), slashes=int32([[[192]]])),
        ["//....", "1c//..", ".11.//"],
    ),
    "block-sparse": (
        partial(block_sparse_attention, blocks=int32([[[[-1, -1], [0, -1], [2, 0]]]])),
        ["//....", "1.//..", "1.1.//"],
    ),
}


@pytest.mark.parametrize("attention, picture", PICTURES.values(), ids=PICTURES.keys())
@pytest.mark.parametrize("name", [ORACLE, *(tested.name for tested in RUN_HERE)])
def test_patterns_are_their_pictures(rng, name, attention, picture):
    tile = {".": np.zeros(64, bool), "1": np.ones(64, bool), "/": np.ones(64, bool), "c": np.arange(64) == 6}
    rows = np.stack([np.concatenate([tile[c] for c in row]) for row in picture])
    mask = np.repeat(rows, 128, axis=0) & np.tri(384, dtype=bool)
    q, k, v = random_qkv(rng, 1, 384, 384, 1, 1, 16)
    expected = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[None, None])
    assert_close(attention(q, k, v, implementation=name), expected)


@pytest.mark.parametrize("name", [ORACLE, *(tested.name for tested in RUN_HERE)])
def test_dense_attention_sees_every_causal_key(rng, name):
    q, k, v = random_qkv(rng, 2, 333, 333, 4, 2, 64)
    lengths = int32([333, 200])
    valid = np.arange(333) < np.asarray(lengths)[:, None]
    expected = jnp.where(valid[..., None, None], jax.nn.dot_product_attention(q, k, v, is_causal=True), 0.0)
    assert_close(dense_attention(q, k, v, lengths=lengths, implementation=name), expected)


@pytest.mark.parametrize("name", [tested.name for tested in KERNELS])
def test_dense_attention_of_a_kernel_lowers_for_cuda(rng, name):
    """Queries at an offset too, which cuDNN does not serve."""
    q, k, v = random_qkv(rng, 1, 128, 384, 2, 1, 64, "bfloat16")
    run = jax.jit(lambda q, k, v: dense_attention(q, k, v, q_offset=256, implementation=name, return_lse=True))
    assert "mosaic_gpu" in run.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()


@run_here
def test_garbage_in_the_padding_does_not_leak(name):
    q, k, v, plan, _, q_offset = ODD.arguments()
    lengths = int32([200, 77])
    clean, _ = attend(name)(q, k, v, plan, lengths, q_offset)
    q, k, v = (x.at[:, 200:].set(jnp.nan) for x in (q, k, v))
    np.testing.assert_array_equal(clean, attend(name)(q, k, v, plan, lengths, q_offset)[0])


@run_here
def test_a_sequence_of_a_batch_equals_the_sequence_alone(name):
    arguments = ODD.arguments()
    together, _ = attend(name)(*arguments)
    for i in range(2):
        alone, _ = attend(name)(*jax.tree.map(lambda x, i=i: x[i : i + 1], arguments[:5]), arguments[5])
        assert_close(together[i : i + 1], alone)


@run_here
def test_parts_at_traced_offsets_equal_the_whole(rng, name):
    q, k, v = random_qkv(rng, 1, 512, 512, 2, 1, 64)
    plan, lengths = a_shape_plan(1, 2, sink=10, window=200), int32([512])
    whole, _ = attend(name)(q, k, v, plan, lengths, jnp.int32(0))
    parts = [attend(name)(q[:, start : start + 256], k, v, plan, lengths, jnp.int32(start))[0] for start in (0, 256)]
    assert_close(jnp.concatenate(parts, 1), whole)


@pytest.mark.parametrize("name", [tested.name for tested in RUN_HERE if tested.backend.differentiable])
def test_gradients_equal_those_of_the_oracle(rng, name):
    q, k, v = random_qkv(rng, 2, 300, 430, 4, 2, 64)
    plan, lengths = random_plan(rng, 2, 4, 300, 430), int32([428, 200])
    weights = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)

    def gradients(name):
        def loss(q, k, v):
            out, lse = attend(name)(q, k, v, plan, lengths, jnp.int32(128))
            return (out * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for actual, expected in zip(gradients(name), gradients(ORACLE), strict=True):
        np.testing.assert_allclose(actual, expected, atol=GRADIENT_ATOL)


@pytest.mark.parametrize("name", [tested.name for tested in RUN_HERE if tested.backend.differentiable])
def test_dense_gradients_equal_those_of_the_oracle(rng, name):
    q, k, v = random_qkv(rng, 1, 300, 300, 4, 2, 64)

    def gradients(name):
        return jax.grad(lambda q, k, v: (dense_attention(q, k, v, implementation=name) ** 2).sum(), (0, 1, 2))(q, k, v)

    for actual, expected in zip(gradients(name), gradients(ORACLE), strict=True):
        np.testing.assert_allclose(actual, expected, atol=GRADIENT_ATOL)


@pytest.mark.parametrize("name", [tested.name for tested in KERNELS if tested.backend.differentiable])
def test_gradients_of_a_kernel_lower_for_cuda(name):
    q, k, v = (jax.ShapeDtypeStruct((1, 256, n, 64), jnp.bfloat16) for n in (2, 1, 1))

    def loss(q, k, v):
        return sparse_attention(q, k, v, SparsePlan(), implementation=name).astype(jnp.float32).sum()

    gradient = jax.grad(loss, (0, 1, 2))
    assert [(x.shape, x.dtype) for x in jax.eval_shape(gradient, q, k, v)] == [(x.shape, x.dtype) for x in (q, k, v)]
    assert "mosaic_gpu" in jax.jit(gradient).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()


def layers(name, q, k, v, plan):
    """Attention of each layer of stacked arrays [layers, maps, b, ...]: vmap in a scan."""
    step = jax.vmap(partial(sparse_attention, implementation=name))
    return jax.lax.scan(lambda c, x: (c, step(*x)), 0, (q, k, v, plan))[1]


def over_heads(name):
    """Attention with the heads shared out over two devices."""
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
    heads, parts = PartitionSpec(None, None, "heads"), SparsePlan(*(PartitionSpec(None, "heads") for _ in range(6)))
    step = partial(sparse_attention, implementation=name)
    return jax.shard_map(step, mesh=mesh, in_specs=(heads, heads, heads, parts), out_specs=heads)


@run_here
def test_vmap_scan_and_shard_map_change_nothing(rng, name):
    q, k, v = random_qkv(rng, 2, 256, 256, 2, 2, 64)
    plan = random_plan(rng, 2, 2, 256, 256)
    expected = sparse_attention(q, k, v, plan, implementation=name)
    stacked = jax.tree.map(lambda x: x[:, None, None], (q, k, v, plan))
    assert_close(np.asarray(layers(name, *stacked))[:, 0, 0], expected)
    assert_close(jax.jit(over_heads(name))(q, k, v, plan), expected)


@pytest.mark.parametrize("name", [tested.name for tested in KERNELS])
def test_kernels_lower_under_vmap_scan_and_shard_map(rng, name):
    q, k, v = random_qkv(rng, 2, 256, 256, 2, 2, 64, "bfloat16")
    plan = random_plan(rng, 2, 2, 256, 256)
    stacked = jax.tree.map(lambda x: x[:, None, None], (q, k, v, plan))
    calls = (
        (partial(layers, name), stacked),
        (over_heads(name), (q, k, v, plan)),
    )
    for call, arguments in calls:
        assert "mosaic_gpu" in jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
