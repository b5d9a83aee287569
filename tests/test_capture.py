"""Captured queries, keys and values are those of the model: checked against the plain NumPy one."""

import jax.numpy as jnp
import numpy as np
from numpy_llama import numpy_llama, random_params

from minference_jax.models import LlamaConfig
from minference_jax.models.capture import capture_qkv
from minference_jax.models.config import Traits
from minference_jax.models.llama import Llama
from minference_jax.patterns import AShape

CONFIG = LlamaConfig(61, 32, 40, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, traits=Traits(qk_norm=True))


def test_layers_come_in_order_after_rope(rng):
    params = {name: jnp.asarray(value) for name, value in random_params(CONFIG).items()}
    tokens, lengths = rng.integers(0, 61, (2, 30)), np.array([30, 11])
    captured = list(capture_qkv(Llama.from_params(CONFIG, params), jnp.asarray(tokens), jnp.asarray(lengths)))
    assert len(captured) == 3
    for row, length in enumerate(lengths):
        expected = numpy_llama(CONFIG, params, tokens[row, :length])["qkv"]
        for ours, theirs in zip(captured, expected, strict=True):
            for got, want in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(got[row, :length], want, atol=2e-5)


def test_layers_run_one_at_a_time_and_densely(rng):
    model = Llama.from_params(CONFIG, {name: jnp.asarray(value) for name, value in random_params(CONFIG).items()})
    tokens = jnp.asarray(rng.integers(0, 61, (1, 300)))
    stream = capture_qkv(model, tokens)
    first = next(stream)
    assert [x.shape for x in first] == [(1, 300, 4, 8), (1, 300, 2, 8), (1, 300, 2, 8)]
    second = next(stream)
    sparse = capture_qkv(model.with_patterns(AShape(sink=1, window=64)), tokens)
    next(sparse)
    np.testing.assert_array_equal(next(sparse)[0], second[0])
