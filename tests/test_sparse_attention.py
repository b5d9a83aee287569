"""The public attention functions: what they return, what they ignore, and mistakes that name themselves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_qkv
from plans import int32

import minference_jax
from pallas_kernels import (
    a_shape_attention,
    block_sparse_attention,
    dense_attention,
    sparse_attention,
    vertical_slash_attention,
)
from pallas_kernels.plan_builders import a_shape_plan, vertical_slash_plan


def test_pattern_functions_equal_their_plans(rng):
    q, k, v = random_qkv(rng, 1, 300, 300, 2, 1, 64)
    reference = jax.jit(partial(sparse_attention, implementation="reference"))
    a_shape = jax.jit(partial(a_shape_attention, sink=5, window=100))(q, k, v)
    assert_close(a_shape, reference(q, k, v, a_shape_plan(1, 2, sink=5, window=100)))
    columns, slashes = int32([[[7, 250, -1], [3, 3, 299]]]), int32([[[0, 150], [77, -1]]])
    plan = jax.jit(partial(vertical_slash_plan, kv_len=300))(columns, slashes)
    out = jax.jit(vertical_slash_attention)(q, k, v, columns, slashes)
    assert_close(out, reference(q, k, v, plan))
    blocks = int32([[[[-1, -1], [1, 0], [3, -1]], [[0, 0], [-1, 1], [2, 9]]]])
    out, mask = jax.jit(block_sparse_attention)(q, k, v, blocks), np.zeros((2, 300, 300), bool)
    for head in range(2):
        for i in range(3):
            for tile in [*np.asarray(blocks)[0, head, i], 2 * i, 2 * i + 1]:
                if tile >= 0:
                    mask[head, 128 * i : 128 * i + 128, 64 * tile : 64 * tile + 64] = True
    mask &= np.tril(np.ones((300, 300), bool))
    assert_close(out, jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[None]))


def test_a_traced_offset_is_rounded_down_to_a_query_tile(rng):
    q, k, v = random_qkv(rng, 1, 64, 256, 2, 1, 64)
    plan = a_shape_plan(1, 2, sink=1, window=64)
    at = jax.jit(lambda offset: sparse_attention(q, k, v, plan, q_offset=offset, implementation="reference"))
    np.testing.assert_array_equal(at(jnp.int32(130)), at(jnp.int32(128)))


@pytest.mark.parametrize("pattern", ["vertical-slash:columns=6,slashes=6", "shared-density:density=0.6,every=64"])
def test_a_broken_key_reaches_no_row_before_it(rng, pattern):
    """In the index neither: its probes may see the key, and then choose what they like, but numbers stay numbers."""
    q, k, v = random_qkv(rng, 1, 300, 300, 2, 1, 8)
    attend = jax.jit(lambda k, v: minference_jax.sparse_attention(q, k, v, pattern))
    for broken in (jnp.nan, jnp.inf, -jnp.inf):
        out = attend(k.at[:, 200].set(broken), v.at[:, 200].set(broken))
        assert np.isfinite(out[:, :200]).all() and not np.isfinite(out[:, 200]).any()


def test_the_log_sum_exp_comes_if_asked_for(rng):
    q, k, v = random_qkv(rng, 1, 64, 64, 2, 1, 16)
    columns, blocks = int32([[[3], [0]]]), int32([[[[0]], [[-1]]]])
    calls = (
        lambda **options: sparse_attention(q, k, v, a_shape_plan(1, 2, sink=1, window=64), **options),
        lambda **options: dense_attention(q, k, v, **options),
        lambda **options: a_shape_attention(q, k, v, sink=1, window=64, **options),
        lambda **options: vertical_slash_attention(q, k, v, columns, columns, **options),
        lambda **options: block_sparse_attention(q, k, v, blocks, **options),
    )
    with_lse = jax.jit(lambda: [call(return_lse=True, scale=0.5) for call in calls])()
    without = jax.jit(lambda: [call(scale=0.5) for call in calls])()
    for (out, lse), alone in zip(with_lse, without, strict=True):
        assert out.shape == q.shape and lse.shape == (1, 64, 2)
        np.testing.assert_allclose(out, alone, atol=1e-6)


def swapped(heads, kv_heads, positions):
    """Queries, keys and values with the axes of positions and heads the wrong way round."""
    return tuple(jnp.zeros((1, count, positions, 32)) for count in (heads, kv_heads, kv_heads))


def test_bad_arguments_name_themselves(rng, unchecked):
    q, k, v = random_qkv(rng, 1, 128, 128, 4, 2, 64)
    plan = a_shape_plan(1, 4, sink=1, window=64)
    cases = [
        (lambda: sparse_attention(q[0], k, v, plan), ValueError, r"q must have four axes.*\(128, 4, 64\)"),
        (lambda: sparse_attention(q, k, v[:, :64], plan), ValueError, r"k and v.*\(1, 128, 2, 64\).*\(1, 64, 2, 64\)"),
        (lambda: sparse_attention(q[:, :, :3], k, v, plan), ValueError, "multiple of KV heads"),
        (lambda: sparse_attention(q, k[:, :64], v[:, :64], plan), ValueError, "more positions than k"),
        (lambda: sparse_attention(*swapped(4, 2, 300), plan), ValueError, "300 heads of 4 positions.*swap their axes"),
        (lambda: sparse_attention(*swapped(4, 4, 130), plan), ValueError, "130 heads of 4 positions.*swap their axes"),
        (lambda: sparse_attention(*swapped(64, 16, 100), plan), ValueError, "more positions than k.*swap their axes 1"),
        (lambda: sparse_attention(*swapped(64, 16, 60), plan), ValueError, r"\(1, 16, 60, 32\)$"),  # no likely reading
        (lambda: sparse_attention(q, k.astype(jnp.bfloat16), v, plan), TypeError, "share one dtype"),
        (
            lambda: sparse_attention(q.astype(jnp.int32), k, v, plan),
            TypeError,
            "q must be float32, bfloat16, float16, got int32",
        ),
        (
            lambda: sparse_attention(q, k, v, a_shape_plan(1, 2, sink=1, window=64)),
            ValueError,
            r"plan\.columns.*expected",
        ),
        (lambda: sparse_attention(q, k, v, plan, lengths=int32([1, 2])), ValueError, "lengths must have shape"),
        (lambda: sparse_attention(q, k, v, plan, lengths=jnp.ones(1)), TypeError, "lengths must be integers"),
        (lambda: sparse_attention(q, k, v, plan, q_offset=64), ValueError, "q_offset must be a multiple of 128"),
        (lambda: sparse_attention(q, k, v, plan, q_offset=128), ValueError, "exceed the 128 positions"),
        (lambda: sparse_attention(q, k, v, plan, scale=-1.0), ValueError, "scale must be a positive"),
        (lambda: sparse_attention(q, k, v, plan, implementation="triton"), ValueError, "implementation must be"),
        (lambda: sparse_attention(q, k, v, plan, implementation="hopper"), ValueError, "bfloat16 or float16"),
        (lambda: dense_attention(q, k, v, implementation="cudnn"), ValueError, "bfloat16 or float16"),
        (lambda: a_shape_attention(q, k, v, sink=-1, window=64), ValueError, "sink must be >= 0"),
        (lambda: a_shape_attention(q, k, v, sink=1.5, window=64), TypeError, "sink must be an integer"),
        (lambda: sparse_attention(q, k, v, "a-shape"), TypeError, "plan must be a SparsePlan, got str"),
        (lambda: vertical_slash_attention(q, k, v, int32([[[1]]]), int32([[[1]]])), ValueError, "columns has shape"),
        (lambda: block_sparse_attention(q, k, v, int32([[[1]]])), ValueError, r"blocks has shape \(1, 1, 1\)"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
