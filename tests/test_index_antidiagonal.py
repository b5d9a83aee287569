"""Antidiagonal estimates against a plain NumPy statement, and as a plan of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_qkv

import pallas_kernels
from minference_jax import sparse_attention
from minference_jax.attention import make_plan
from minference_jax.patterns import Antidiagonal


def tile_mass(q, k, length, offset, stride):
    """[query tiles, key tiles]: softmax over cells of the antidiagonal sums, rows and cells summed by tile."""
    end = min(length, offset + len(q))
    rows, cells = -(-(end - offset) // stride), -(-end // stride)
    scores = np.full((rows, cells), -np.inf)
    for a in range(rows):
        for c in range(cells):
            if c * stride <= offset + a * stride:
                pairs = ((offset + a * stride + i, c * stride + stride - 1 - i) for i in range(stride))
                scores[a, c] = sum(q[x - offset] @ k[y] for x, y in pairs if x < end and y < end)
    scores *= q.shape[-1] ** -0.5 / stride
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mass = np.zeros((-(-len(q) // 128), -(-len(k) // 64)))
    for a in range(rows):
        for c in range(cells):
            mass[a * stride // 128, c * stride // 64] += weights[a, c]
    return mass


@pytest.mark.parametrize(("offset", "stride"), [(0, 8), (256, 16)])
def test_equals_the_rule(rng, offset, stride):
    q, k, _ = random_qkv(rng, 2, 300, offset + 300, 2, 1, 8)
    q = 3 * q
    lengths = jnp.asarray([offset + 300, offset + 171], jnp.int32)
    pattern = Antidiagonal(blocks=6, coverage=0.7, stride=stride)
    plan = jax.jit(lambda q, k, o: make_plan(q, k, pattern, lengths=lengths, q_offset=o))(q, k, jnp.int32(offset))
    for row in range(2):
        for head in range(2):
            mass = tile_mass(np.asarray(q)[row, :, head], np.asarray(k)[row, :, 0], int(lengths[row]), offset, stride)
            for i, tiles in enumerate(mass):
                past = (offset + 128 * i) // 64
                order = [0, *(t for t in np.argsort(-tiles[:past], kind="stable") if t)][:past]
                held = tiles[past:].sum() + np.cumsum(tiles[order])
                wanted = 1 + int(np.sum(held < 0.7 * tiles.sum() * (1 - 1e-6)))
                count = int(plan.block_count[row, head, i])
                assert count == min(wanted, past, 6)
                np.testing.assert_array_equal(plan.blocks[row, head, i, :count], sorted(order[:count]))


def test_serves_attention(rng):
    q, k, v = random_qkv(rng, 1, 256, 256, 2, 2, 16)
    pattern = Antidiagonal(blocks=2)
    expected = pallas_kernels.sparse_attention(q, k, v, make_plan(q, k, pattern), implementation="reference")
    assert_close(sparse_attention(q, k, v, pattern), expected)


def test_bad_fields_are_named():
    for fields, name in (({"blocks": 0}, "blocks"), ({"coverage": 0.0}, "coverage"), ({"stride": 3}, "stride")):
        with pytest.raises(ValueError, match=name):
            Antidiagonal(**fields)
