"""The KV cache: decoding token by token, and prefill in parts, give what one pass over everything gives."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from numpy_llama import numpy_llama, random_params

from minference_jax.models import LlamaConfig, forward, part_attention
from minference_jax.models.cache import KVCache, cache_dtype
from minference_jax.models.llama import Llama
from minference_jax.models.part_attention import prefix_extents
from minference_jax.models.rounding import turned
from minference_jax.patterns import AShape, VerticalSlash, layer_patterns

CONFIG = LlamaConfig(61, 32, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_params(CONFIG, {name: jnp.asarray(value) for name, value in random_params(CONFIG).items()})


def prompt(rng, *shape: int) -> np.ndarray:
    return rng.integers(0, CONFIG.vocab_size, shape).astype(np.int32)


def full_pass(model: Llama, tokens: np.ndarray) -> np.ndarray:
    return numpy_llama(CONFIG, model.params(), tokens)["logits"]


def test_decoding_equals_the_full_pass_for_unequal_lengths(model, rng):
    tokens, lengths = prompt(rng, 3, 50), np.array([30, 7, 44])
    cache = model.init_cache(3, 64)
    logits, cache = model.prefill(jnp.asarray(tokens[:, :44]), jnp.asarray(lengths), cache)
    expected = [full_pass(model, row) for row in tokens]
    for step in range(6):
        now = [expected[row][lengths[row] + step - 1] for row in range(3)]
        np.testing.assert_allclose(logits, np.stack(now), atol=2e-5)
        logits, cache = model.decode(jnp.asarray(tokens[np.arange(3), lengths + step]), cache)
    np.testing.assert_array_equal(cache.lengths, lengths + 6)
    for row in range(3):
        np.testing.assert_array_equal(cache.tokens[row, : lengths[row] + 6], tokens[row, : lengths[row] + 6])


def test_prefill_in_parts_equals_one_shot(model, rng):
    tokens, lengths = prompt(rng, 2, 384), np.array([380, 150])
    whole, one = model.prefill(jnp.asarray(tokens), jnp.asarray(lengths), model.init_cache(2, 384))
    cache = model.init_cache(2, 384)
    last = {}
    for start in (0, 128, 256):
        logits, cache = model.prefill(
            jnp.asarray(tokens[:, start : start + 128]), jnp.asarray(lengths), cache, start=jnp.int32(start)
        )
        last |= {row: logits[row] for row in range(2) if start < lengths[row]}
        np.testing.assert_array_equal(cache.lengths, np.minimum(lengths, start + 128))
    np.testing.assert_allclose(jnp.stack([last[0], last[1]]), whole, atol=2e-5)
    for row in range(2):
        np.testing.assert_allclose(cache.k[:, row, : lengths[row]], one.k[:, row, : lengths[row]], atol=2e-5)
        np.testing.assert_allclose(cache.v[:, row, : lengths[row]], one.v[:, row, : lengths[row]], atol=2e-5)


@pytest.mark.parametrize("pattern", [None, VerticalSlash(columns=300, tiles=5)])
def test_a_chunked_prefill_equals_one_shot(model, pattern, rng):
    # A budget that covers everything within a part's own keys: chunks change the index, not what it may see.
    model = model.with_patterns(pattern)
    tokens, lengths = jnp.asarray(prompt(rng, 2, 300)), jnp.asarray([300, 100])
    whole, one = model.prefill(tokens, lengths, model.init_cache(2, 384))
    logits, cache, info = model.prefill(tokens, lengths, model.init_cache(2, 384), chunk=128, return_info=True)
    np.testing.assert_allclose(logits, whole, atol=2e-5)
    np.testing.assert_array_equal(cache.lengths, lengths)
    np.testing.assert_allclose(cache.k[:, 0, :300], one.k[:, 0, :300], atol=2e-5)
    assert len(info) == 3
    with pytest.raises(ValueError, match="multiple of 128"):
        model.prefill(tokens, lengths, cache, chunk=100)
    with pytest.raises(ValueError, match="needs a cache"):
        model.prefill(tokens, lengths, chunk=128)


@pytest.mark.parametrize(("dtype", "error"), [("fp8", 0.05), ("int8", 0.015)])
def test_a_quantized_cache_rounds_rows_and_decodes_as_the_plain_one(model, dtype, error, rng):
    tokens = jnp.asarray(prompt(rng, 2, 140))
    _, plain = model.prefill(tokens, None, model.init_cache(2, 160))
    logits, cache = model.prefill(tokens, None, model.init_cache(2, 160, dtype))
    assert cache.k.dtype.itemsize == 1 and cache.k_scale.shape == (2, 2, 160, 2)
    keys, values = cache.read(1, jnp.float32)
    for exact, got in zip((plain.k[1, :, :140], plain.v[1, :, :140]), (turned(keys), values), strict=True):
        assert relative_error(got[:, :140], exact) < error
    # Prefill in one call attends to exact keys; only decoding, and later parts, see the rounding.
    last = jnp.argmax(logits, axis=-1)
    expected, _ = model.decode(last, plain)
    got, cache = model.decode(last, cache.grown(200))
    assert relative_error(got, expected) < 2 * error
    np.testing.assert_array_equal(cache.lengths, [141, 141])
    chunked, _ = model.prefill(tokens, None, model.init_cache(2, 160, dtype), chunk=128)
    assert relative_error(chunked, logits) < 2 * error


def test_a_cache_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match="model's dtype"):
        cache_dtype("float16", "bfloat16")


def test_feeding_cached_tokens_again_changes_nothing(model, rng):
    tokens = prompt(rng, 1, 250)
    _, cache = model.prefill(jnp.asarray(tokens[:, :200]), None, model.init_cache(1, 256))
    logits, cache = model.prefill(jnp.asarray(tokens[:, 128:]), jnp.asarray([250]), cache, start=128)
    np.testing.assert_allclose(logits[0], full_pass(model, tokens[0])[-1], atol=2e-5)
    assert int(cache.lengths[0]) == 250


def test_a_traced_start_past_the_end_is_that_of_the_last_rows_that_fit(model, rng):
    tokens, lengths = jnp.asarray(prompt(rng, 1, 384)), jnp.asarray([384])
    _, cache = model.prefill(tokens[:, :256], None, model.init_cache(1, 384))
    got, cache = model.prefill(tokens[:, 256:], lengths, cache, start=jnp.int32(512))
    np.testing.assert_allclose(got[0], full_pass(model, np.asarray(tokens[0]))[-1], atol=2e-5)
    again, _ = model.prefill(tokens[:, 256:], lengths, cache, start=jnp.int32(300))  # no multiple of 128
    np.testing.assert_allclose(again, got, atol=2e-5)


def test_what_lies_past_the_length_is_never_read(model, rng):
    tokens = prompt(rng, 1, 20)
    _, cache = model.prefill(jnp.asarray(tokens), None, model.init_cache(1, 32))
    poisoned = KVCache(
        cache.k.at[:, :, 20:].set(1e4), cache.v.at[:, :, 20:].set(1e9), cache.tokens + 0, cache.lengths + 0
    )
    clean, _ = model.decode(jnp.asarray([5]), cache)
    got, _ = model.decode(jnp.asarray([5]), poisoned)
    np.testing.assert_array_equal(got, clean)


def test_a_full_cache_stays_as_it_is(model, rng):
    _, cache = model.prefill(jnp.asarray(prompt(rng, 2, 16)), jnp.asarray([16, 9]), model.init_cache(2, 16))
    keys = np.array(cache.k[:, 0])
    logits, cache = model.decode(jnp.asarray([3, 3]), cache)
    np.testing.assert_array_equal(cache.lengths, [16, 10])
    np.testing.assert_array_equal(cache.k[:, 0], keys)
    assert np.isfinite(np.asarray(logits[1])).all()


def test_growing_keeps_contents_and_is_free_when_there_is_room(model, rng):
    _, cache = model.prefill(jnp.asarray(prompt(rng, 1, 16)), None, model.init_cache(1, 16))
    assert cache.grown(10) is cache
    keys = np.array(cache.k)
    grown = cache.grown(40)
    assert grown.capacity == 40 and int(grown.lengths[0]) == 16
    np.testing.assert_array_equal(grown.k[:, :, :16], keys)
    assert cache.k.is_deleted() and cache.v.is_deleted()  # or there would be two caches
    with pytest.raises(ValueError, match="batch and length"):
        model.init_cache(0, 5)


def test_the_cache_is_a_pytree_of_static_shape(model):
    cache = model.init_cache(2, 128)
    assert cache.k.shape == (2, 2, 128, 2, 8) and cache.capacity == 128
    shapes = jax.eval_shape(lambda tokens, cache: model.decode(tokens, cache)[1], jnp.zeros(2, jnp.int32), cache)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, cache)


@pytest.mark.parametrize(
    ("pattern", "keep"), [(VerticalSlash(columns=40, tiles=3), "nothing"), (AShape(sink=4, window=70), "info")]
)
def test_a_part_reads_a_prefix_of_a_long_cache_and_finds_the_same(model, pattern, keep, rng, monkeypatch):
    assert prefix_extents(128, 1024) == [1024]
    assert prefix_extents(64, 1024, short=0) == [256, 512, 768, 1024]
    assert prefix_extents(300, 1000, short=0) == [384, 768, 1000]
    assert prefix_extents(600, 1000, short=0) == [1000]
    tokens = jnp.asarray(prompt(rng, 2, 640))
    _, cache = model.prefill(tokens, None, model.init_cache(2, 1024))
    model = model.with_patterns(pattern)

    @partial(jax.jit, static_argnums=0)
    def part(short: int, start: jax.Array) -> Any:
        monkeypatch.setattr(part_attention, "SHORT", short)
        monkeypatch.setattr(part_attention, "EXTENTS", 2)
        lengths = jnp.asarray([128, 50]) + start
        rows = jax.lax.dynamic_slice_in_dim(tokens, start, 128, axis=1)
        arguments = model.layer_patterns, rows, lengths, lengths, cache, start
        x, _, info = forward.prefill(CONFIG, model.params(), *arguments, keep=keep)
        return x, info

    for start in (0, 128, 512):
        (got, info), (expected, expected_info) = part(0, jnp.int32(start)), part(4096, jnp.int32(start))
        np.testing.assert_allclose(got, expected, atol=1e-5)
        if keep == "info":
            np.testing.assert_allclose(info.density, expected_info.density, rtol=1e-6)


def test_budgets_grow_with_the_root_of_what_a_part_has_seen():
    patterns = layer_patterns(
        [VerticalSlash(columns=100, tiles=10), VerticalSlash(90, 600), AShape(sink=4, window=70)], 3
    )
    got = patterns.for_part(jnp.asarray([256, 100]), jnp.asarray([1024, 100]))
    _, vertical_slash = got.budgets
    np.testing.assert_array_equal(vertical_slash.columns, [[50, 45, 0], [100, 90, 0]])
    np.testing.assert_array_equal(vertical_slash.tiles, [[5, -1, -1], [10, -1, -1]])
    np.testing.assert_array_equal(vertical_slash.slashes[:, 1], [300, 600])
