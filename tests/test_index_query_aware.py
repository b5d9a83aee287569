"""The query-aware test and its blocks against a plain NumPy statement, and the mix of heads as one plan."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_index
import pytest
from helpers import assert_close, random_qkv

import pallas_kernels
from minference_jax import sparse_attention
from minference_jax.attention import make_plan
from minference_jax.index.query_aware import divergence
from minference_jax.patterns import QueryAware


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def root_divergence(p, q):
    middle = (p + q) / 2
    parts = [np.sum(np.where(x > 0, x * np.log(np.maximum(x, 1e-30) / middle), 0)) for x in (p, q)]
    return np.sqrt(sum(parts) / 2)


def test_divergence_by_hand():
    p = jnp.asarray([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    q = jnp.asarray([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    np.testing.assert_allclose(divergence(p, q), [np.log(2) ** 0.5, 0, 0.46450], atol=1e-4)


def head_divergence(q, k, length, offset):
    end = min(length, offset + len(q))
    rows = np.arange(max(offset, end - 128), end)
    weights = numpy_index.softmax_rows(q[rows - offset], k[:end], rows).mean(0)
    truth = np.add.reduceat(weights, np.arange(0, end, 64))
    pooled = numpy_index.pooled(k[:end], 64, end)
    return root_divergence(truth, softmax(q[rows - offset].mean(0) @ pooled.T * q.shape[-1] ** -0.5))


@pytest.mark.parametrize("offset", [0, 256])
def test_equals_the_rule(rng, offset):
    """Heads of weak and strong scores: the strong ones' pooled estimate is wrong."""
    q, k, _ = random_qkv(rng, 2, 300, offset + 300, 4, 2, 8)
    q = q * jnp.asarray([0.1, 0.3, 3.0, 9.0])[:, None]
    lengths = jnp.asarray([offset + 300, offset + 71], jnp.int32)
    pattern = QueryAware(blocks=4, columns=20, tiles=2, coverage=0.6, divergence=0.25)
    plan = jax.jit(lambda q, k, o: make_plan(q, k, pattern, lengths=lengths, q_offset=o))(q, k, jnp.int32(offset))
    seen = set()
    for row in range(2):
        for head in range(4):
            queries, keys, length = np.asarray(q)[row, :, head], np.asarray(k)[row, :, head // 2], int(lengths[row])
            aware = head_divergence(queries, keys, length, offset) <= 0.25
            seen.add(aware)
            if not aware:
                assert int(plan.column_count[row, head]) > 0
                np.testing.assert_array_equal(plan.block_count[row, head], 0)
                continue
            assert int(plan.column_count[row, head]) == int(plan.band_count[row, head]) == 0
            scores = numpy_index.block_scores(queries, keys, length, offset) * 8**-0.5
            for i in range(-(-(min(length, offset + 300) - offset) // 128)):
                past = (offset + 128 * i) // 64
                mass = softmax(scores[i, : min(past + 2, -(-length // 64))])
                order = [0, *(t for t in np.argsort(-mass[:past], kind="stable") if t)][:past]
                wanted = 1 + int(np.sum(mass[past:].sum() + np.cumsum(mass[order]) < 0.6 * (1 - 1e-6)))
                count = int(plan.block_count[row, head, i])
                assert count == min(wanted, past, 4)
                np.testing.assert_array_equal(plan.blocks[row, head, i, :count], sorted(order[:count]))
    assert seen == {True, False}


def test_serves_attention(rng):
    q, k, v = random_qkv(rng, 1, 256, 256, 2, 2, 16)
    q = q * jnp.asarray([0.1, 3.0])[:, None]
    pattern = QueryAware(blocks=2, columns=10, tiles=1)
    expected = pallas_kernels.sparse_attention(q, k, v, make_plan(q, k, pattern), implementation="reference")
    assert_close(sparse_attention(q, k, v, pattern), expected)


def test_bad_fields_are_named():
    for fields, name in (({"blocks": 0}, "blocks"), ({"coverage": 2.0}, "coverage"), ({"divergence": -1.0}, "diverg")):
        with pytest.raises(ValueError, match=name):
            QueryAware(**fields)
