"""Gradients: of a model's loss with sparse patterns, beside finite differences; of attention whose padding is broken;
their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_qkv

from minference_jax import AShape, BlockSparse, Dense, HeadPatterns, Llama, LlamaConfig, sparse_attention


def test_gradient_of_a_loss_with_sparse_patterns_equals_finite_differences(rng):
    config = LlamaConfig(64, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, tie_embeddings=True)
    patterns = HeadPatterns(((AShape(2, 65), BlockSparse(1)),))
    params = Llama.random(config, jax.random.key(0)).params()
    tokens, lengths = jnp.asarray(rng.integers(0, 64, (2, 260)), jnp.int32), jnp.array([260, 140], jnp.int32)

    @jax.jit
    def loss(params):
        model = Llama.from_params(config, params, patterns)
        return -model.token_log_likelihoods(tokens, lengths, implementation="xla").sum() / 398

    gradient = jax.grad(loss)(params)
    norm = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(gradient)))

    def along(step):
        return float(loss(jax.tree.map(lambda x, d: x + d * jnp.float32(step / norm), params, gradient)))

    # Errors of second order cancel between two steps, which leaves float32's rounding.
    coarse, fine = ((along(step) - along(-step)) / (2 * step) for step in (0.1, 0.05))
    assert abs((4 * fine - coarse) / 3 - norm) <= 1e-3 * norm
    logits = jax.eval_shape(lambda p: Llama.from_params(config, p, patterns)(tokens, implementation="xla"), params)
    assert logits.shape == (2, 260, 64)


@pytest.mark.parametrize("pattern", [AShape(2, 3), Dense()], ids=str)
def test_broken_padding_reaches_no_gradient_of_valid_positions(rng, pattern):
    """Of queries, keys, values and of the output's gradient, which multiply zeros in the backward pass."""
    q, k, v = random_qkv(rng, 1, 130, 130, 1, 1, 8)
    padding = (jnp.arange(130) >= 100)[None, :, None, None]

    @jax.jit
    def gradients(q, k, v, d_out):
        _, backward = jax.vjp(lambda *x: sparse_attention(*x, pattern, lengths=jnp.array([100])), q, k, v)
        return backward(d_out)

    expected = gradients(q, k, v, jnp.where(padding, 0, q))
    for broken in (jnp.nan, jnp.inf):
        found = gradients(*(jnp.where(padding, broken, x) for x in (q, k, v, q)))
        for actual, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(actual[:, :100], wanted[:, :100])


def test_memory_of_a_gradient_grows_with_the_length_not_with_its_square():
    def temporary(length):
        q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        loss = jax.grad(lambda q: sparse_attention(q, q, q, AShape(2, 65)).sum())
        return jax.jit(loss).lower(q).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(8_192), temporary(65_536)
    assert long < 8.5 * short
    assert long < 4 * 65_536 * 8 * 30  # thirty arrays of q's size; a row of scores for each query would be 17 GB
