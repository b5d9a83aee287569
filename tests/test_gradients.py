"""Gradients: of a model's loss with sparse patterns, beside finite differences; of attention whose padding is broken;
their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_qkv
from numpy_llama import random_llama

from minference_jax import AShape, Dense, HeadPatterns, Llama, LlamaConfig, sparse_attention


def test_gradient_of_a_loss_with_sparse_patterns_equals_finite_differences(rng):
    config = LlamaConfig(64, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, tie_embeddings=True)
    patterns = HeadPatterns((("a-shape:sink=2,window=65", "a-shape:sink=4,window=1"),))
    params = random_llama(config).params()
    tokens, lengths = jnp.asarray(rng.integers(0, 64, (2, 200)), jnp.int32), jnp.array([200, 140], jnp.int32)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        model = Llama.from_params(config, params, patterns)
        return -model.token_log_likelihoods(tokens, lengths, implementation="xla").sum() / 338

    params, gradient = (jax.tree.map(np.asarray, tree) for tree in (params, loss(params)[1]))
    norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(gradient)))

    def along(step):
        return float(loss(jax.tree.map(lambda x, d: x + d * np.float32(step / norm), params, gradient))[0])

    # Errors of second order cancel between two steps, which leaves float32's rounding.
    coarse, fine = ((along(step) - along(-step)) / (2 * step) for step in (0.1, 0.05))
    assert abs((4 * fine - coarse) / 3 - norm) <= 1e-3 * norm
    logits = jax.eval_shape(lambda p: Llama.from_params(config, p, patterns)(tokens, implementation="xla"), params)
    assert logits.shape == (2, 200, 64)


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


def test_memory_of_a_gradient_is_some_copies_of_its_inputs():
    q = jax.ShapeDtypeStruct((1, 65_536, 1, 8), jnp.float32)
    loss = jax.grad(lambda q: sparse_attention(q, q, q, AShape(2, 65)).sum())
    memory = jax.jit(loss).lower(q).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 30 * 4 * q.size  # 63 MB; a score for each query and key would take 17 GB
