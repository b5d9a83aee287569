"""Sparse attention inside Flax's own layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minference_jax import AShape, Dense, PlanBuilder, sparse_attention
from minference_jax.nn import attention_fn
from pallas_kernels import SparsePlan


def layer(pattern, **options):
    function = attention_fn(pattern) if pattern is not None else nnx.dot_product_attention
    return nnx.MultiHeadAttention(2, 32, decode=False, rngs=nnx.Rngs(0), attention_fn=function, **options)


def test_a_layer_is_that_of_flax_where_the_pattern_is_dense_and_another_where_it_is_not():
    x = jax.random.normal(jax.random.key(0), (1, 300, 32))
    causal = layer(None)(x, mask=nnx.make_causal_mask(x[..., 0]))
    np.testing.assert_allclose(layer(Dense())(x, is_causal=True), causal, atol=1e-5)
    sparse = layer(AShape(2, 65))(x)
    np.testing.assert_allclose(sparse[:, :128], causal[:, :128], atol=1e-5)  # within the window
    assert float(jnp.abs(sparse - causal).max()) > 1e-3


def test_what_would_be_left_out_is_refused():
    x = jnp.ones((1, 130, 32))
    with pytest.raises(ValueError, match="takes no mask"):
        layer(AShape(2, 65))(x, mask=nnx.make_causal_mask(x[..., 0]))
    with pytest.raises(ValueError, match="no dropout"):
        layer(AShape(2, 65), dropout_rate=0.5)(x, deterministic=False, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="takes no module"):
        layer(AShape(2, 65))(x, sow_weights=True)
    with pytest.raises(ValueError, match=r"must have the same positions, got q \(1, 130, 2, 16\), k \(1, 140, 2, 16\)"):
        layer(AShape(2, 65))(x, jnp.ones((1, 140, 32)))
    heads = x.reshape(1, 130, 2, 16)
    with pytest.raises(ValueError, match="is causal, got is_causal=False"):
        sparse_attention(heads, heads, heads, "dense", is_causal=False)


def test_a_pattern_is_an_argument_of_a_jitted_function():
    x = jax.random.normal(jax.random.key(0), (1, 130, 2, 16))
    expected = sparse_attention(x, x, x, "a-shape:sink=2,window=65", is_causal=True)
    jitted = jax.jit(sparse_attention)
    np.testing.assert_array_equal(jitted(x, x, x, AShape(2, 65)), expected)
    np.testing.assert_array_equal(jitted(x, x, x, [AShape(2, 65), AShape(2, 65)]), expected)
    named = jax.jit(sparse_attention, static_argnames="pattern")
    np.testing.assert_array_equal(named(x, x, x, pattern="a-shape:sink=2,window=65"), expected)


def test_an_index_that_jax_does_not_know_is_named():
    @dataclasses.dataclass(frozen=True)
    class Mine(PlanBuilder):
        def build(self, q, k, *, lengths, q_offset, scale):
            return SparsePlan()

    x = jnp.ones((1, 130, 2, 16))
    with pytest.raises(TypeError, match=r"Mine\(\) is no pytree: put @jax\.tree_util\.register_static over Mine"):
        sparse_attention(x, x, x, Mine())
    jax.tree_util.register_static(Mine)
    assert jax.eval_shape(lambda: sparse_attention(x, x, x, Mine())).shape == x.shape
