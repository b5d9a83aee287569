"""Dual chunk attention against a definition of its own in NumPy: a table of distances, and one softmax."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_llama import random_params

from minference_jax import AShape
from minference_jax.models import LlamaConfig
from minference_jax.models.dual_chunk import dual_chunk_attention
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama
from minference_jax.models.rope import apply_rope, inverse_frequencies
from minference_jax.models.traits import DualChunk

HF = {
    "model_type": "qwen2",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
CHUNKS = {"chunk_size": 96, "local_size": 32, "original_max_position_embeddings": 96}
PLAIN, CONFIG = LlamaConfig.from_hf(HF), LlamaConfig.from_hf(HF | {"dual_chunk_attention_config": CHUNKS})
LENGTH = 300  # five chunks of 64: pairs of all three cases


def distances(chunks: DualChunk, length: int) -> np.ndarray:
    """What RoPE sees between each query and each key, one pair at a time."""
    table = np.zeros((length, length))
    for query in range(length):
        for key in range(query + 1):
            i, j = query % chunks.stride, key % chunks.stride
            between = query // chunks.stride - key // chunks.stride
            table[query, key] = (i, min(i + chunks.stride, chunks.chunk_size), chunks.chunk_size)[min(between, 2)] - j
    return table


def oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, frequencies: np.ndarray, chunks: DualChunk) -> np.ndarray:
    """Attention of `[t, n, h]` before any RoPE."""
    t, n, h = q.shape
    pairs = [x[..., : h // 2] + 1j * x[..., h // 2 :] for x in (q, np.repeat(k, n // k.shape[1], axis=1))]
    turns = np.exp(1j * distances(chunks, t)[:, :, None] * frequencies)
    scores = np.einsum("tnr,snr,tsr->nts", pairs[0], pairs[1].conj(), turns, optimize=True).real / np.sqrt(h)
    scores *= max(1.0, 0.1 * np.log(t / chunks.trained) + 1)
    scores = np.where(np.tri(t, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights, np.repeat(v, n // v.shape[1], axis=1))


@pytest.mark.parametrize("length", [LENGTH, 96, 33])
def test_it_is_the_softmax_over_the_table_of_distances(rng, length):
    q, k, v = (rng.standard_normal((length, heads, 8)) for heads in (4, 2, 2))
    frequencies = inverse_frequencies(CONFIG, jnp.asarray([length]))
    place = jnp.arange(length, dtype=jnp.int32) % 64
    angles = place[None, :, None].astype(jnp.float32) * frequencies[:, None]
    turned = [apply_rope(jnp.asarray(x[None], jnp.float32), jnp.cos(angles), jnp.sin(angles)) for x in (q, k)]
    lengths = jnp.asarray([length], jnp.int32)
    options = {"start": jnp.zeros(1, jnp.int32), "lengths": lengths, "whole": lengths}
    attend = jax.jit(lambda *qkv: dual_chunk_attention(CONFIG, *qkv, **options))
    out = attend(*turned, jnp.asarray(v[None], jnp.float32))
    assert CONFIG.traits.dual_chunk is not None
    expected = oracle(q, k, v, np.asarray(frequencies[0], np.float64), CONFIG.traits.dual_chunk)
    np.testing.assert_allclose(out[0], expected, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    return Llama.from_params(CONFIG, random_params(CONFIG))


@pytest.fixture(scope="module")
def unscaled(model):
    """The same model, whose scores do not grow with the length."""
    traits = dataclasses.replace(CONFIG.traits, dual_chunk=DualChunk(96, 32))
    return Llama.from_params(dataclasses.replace(CONFIG, traits=traits), model.params())


def test_up_to_the_trained_length_nothing_changes(model, unscaled, rng):
    plain = Llama.from_params(PLAIN, model.params())
    tokens = jnp.asarray(rng.integers(0, 97, (1, 96)), jnp.int32)
    np.testing.assert_array_equal(model(tokens), plain(tokens))
    sparse = [x.with_patterns(AShape(sink=1, window=1))(tokens) for x in (model, plain)]
    np.testing.assert_array_equal(*sparse)
    longer = jnp.asarray(rng.integers(0, 97, (1, 97 + 64)), jnp.int32)
    # Beyond it, rows whose keys are all in their own chunk or at their true distance are those of plain positions.
    ours, theirs = unscaled(longer), plain(longer)
    np.testing.assert_allclose(ours[:, :96], theirs[:, :96], atol=1e-4)
    assert np.abs(ours[:, 130:] - theirs[:, 130:]).max() > 1e-2


def test_a_cache_parts_and_decoding_agree_with_one_call(model, unscaled, rng):
    tokens = jnp.asarray(rng.integers(0, 97, (2, LENGTH)), jnp.int32)
    lengths = jnp.asarray([LENGTH, 170], jnp.int32)
    last, _ = model.prefill(tokens, lengths, model.init_cache(2, 384))
    np.testing.assert_allclose(last[1], model(tokens[1:, :170])[0, -1], atol=1e-4)
    padded = jnp.pad(tokens, ((0, 0), (0, 84)))
    parts, _ = model.prefill(padded, lengths, model.init_cache(2, 384), chunk=128)
    np.testing.assert_allclose(parts, last, atol=1e-4)
    _, cache = unscaled.prefill(tokens, lengths, unscaled.init_cache(2, 384))
    step, _ = unscaled.decode(jnp.asarray([5, 6], jnp.int32), cache)
    longer = jnp.concatenate([tokens[:1], jnp.asarray([[5]], jnp.int32)], axis=1)
    np.testing.assert_allclose(step[0], unscaled(longer)[0, -1], atol=1e-4)


def test_a_conversation_that_outgrows_its_cache_is_read_again(model, rng):
    first = rng.integers(0, 97, (1, 60))
    short = generate(model, first, max_new_tokens=2, eos_token_ids=(), strict=True)
    longer = np.concatenate([first, short.tokens, rng.integers(0, 97, (1, 200))], axis=1)
    again = generate(model, longer, max_new_tokens=2, eos_token_ids=(), cache=short.cache)
    assert again.tokens.tolist() == generate(model, longer, max_new_tokens=2, eos_token_ids=()).tokens.tolist()


def test_what_cannot_be_combined_is_named(model):
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    with pytest.raises(ValueError, match=r"sparse patterns cannot be combined with dual chunk attention.* 96 tokens"):
        model.with_patterns(AShape(sink=1, window=1))(tokens)
    auto, dense = (x.prefill(tokens)[0] for x in (model.with_patterns("auto"), model))
    np.testing.assert_array_equal(auto, dense)
    window = {"use_sliding_window": True, "sliding_window": 8}
    for change, message in (
        ({"chunk_size": 32}, "local_size < chunk_size"),
        ({"local_size": "8"}, "local_size must be"),
    ):
        with pytest.raises(ValueError, match=message):
            LlamaConfig.from_hf(HF | {"dual_chunk_attention_config": CHUNKS | change})
    with pytest.raises(ValueError, match="not supported together"):
        LlamaConfig.from_hf(HF | window | {"dual_chunk_attention_config": CHUNKS})
    assert LlamaConfig.from_hf(CONFIG.to_hf()) == CONFIG
