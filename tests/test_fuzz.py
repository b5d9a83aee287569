"""Random plans, with every kind of trouble that the rule of `SparsePlan` names, on each backend that a CPU runs."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_cases import UNDER_TEST, Case
from helpers import ATOL, random_qkv
from plans import int32, random_plan

from pallas_kernels import SparsePlan, sparse_attention

SHAPES = (
    Case(2, 130, 130, 2, 1, 8, widths=(9, 4, 3)),
    Case(1, 140, 400, 3, 3, 4, q_offset=256, widths=(70, 6, 2)),
)
BACKENDS = [tested.name for tested in UNDER_TEST if tested.interpreted is None]
EXTREMES = np.array([-(2**31), 2**31 - 1, -1, 0, 2**31 - 64, 2**30, -(2**30)])


@cache
def attend(name: str):
    """Output, LSE (numbers where it is −inf) and density, compiled once for each shape. The oracle counts its mask."""

    def run(q, k, v, plan, lengths, q_offset):
        where = {"lengths": lengths, "q_offset": q_offset}
        out, lse = sparse_attention(q, k, v, plan, implementation=name, return_lse=True, **where)
        if name == "reference":
            rows = q_offset + jnp.arange(q.shape[1], dtype=jnp.int32)
            causal = jnp.where(rows < lengths[:, None], rows + 1, 0).sum(-1)[:, None]
            density = plan.to_mask(q.shape[1], k.shape[1], **where).sum((2, 3)) / jnp.maximum(causal, 1)
        else:
            density = plan.density(q.shape[1], k.shape[1], **where)
        return out, jnp.where(jnp.isneginf(lse), jnp.float32(-1e30), lse), density

    return jax.jit(run)


def troubled_plan(rng: np.random.Generator, case: Case) -> SparsePlan:
    """A random plan; in some of them entries of any size, lists in any order, counts below zero and past the width."""
    columns, bands, blocks = case.widths
    plan = random_plan(rng, case.b, case.n, case.t, case.s, columns=columns, bands=bands, blocks=blocks)
    changed = {}
    for name in ("columns", "bands", "blocks"):
        entries = np.array(getattr(plan, name))
        if rng.random() < 0.3:
            entries = rng.permuted(entries, axis=-1)
        if rng.random() < 0.3:
            where = rng.random(entries.shape) < 0.1
            entries = np.where(where, rng.choice(EXTREMES, entries.shape), entries)
        changed[name] = int32(entries)
    for name in ("column_count", "band_count", "block_count"):
        count = np.array(getattr(plan, name))
        if rng.random() < 0.2:
            where = rng.random(count.shape) < 0.3
            count = np.where(where, rng.choice(EXTREMES, count.shape), count)
        changed[name] = int32(count)
    return dataclasses.replace(plan, **changed, band_multiple=64 if case.b == 1 else 1)


def arguments(number: int):
    rng = np.random.default_rng(number)
    case = SHAPES[number % len(SHAPES)]
    q, k, v = random_qkv(rng, case.b, case.t, case.s, case.n, case.k, case.h)
    lengths = int32(rng.choice([-5, 0, 1, 64, case.s - 1, case.s, case.s + 9, rng.integers(case.s)], case.b))
    offset = jnp.int32(rng.integers(0, case.q_offset // 128 + 1) * 128)
    return q * jnp.float32(rng.choice([1, 30])), k, v, troubled_plan(rng, case), lengths, offset


@pytest.mark.parametrize(
    "plans", [20, 300, pytest.param(10_000, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)])]
)
@pytest.mark.parametrize("name", BACKENDS)
def test_random_plans_equal_the_oracle(name, plans):
    atol = 3 * ATOL[jnp.dtype("float32")]
    for number in range(plans):
        given = arguments(number)
        expected = attend("reference")(*given)
        for what, actual, wanted in zip(("output", "LSE", "density"), attend(name)(*given), expected, strict=True):
            np.testing.assert_allclose(actual, wanted, atol=atol, rtol=atol, err_msg=f"{what} of plan {number}")
