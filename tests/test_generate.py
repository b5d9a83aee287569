"""Generation: the tokens of step-by-step full passes, one compile per bucket, ends, streams, follow-up turns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_llama import numpy_greedy, random_params

from minference_jax.models import LlamaConfig, RopeConfig
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama
from minference_jax.models.rope import attention_factor
from minference_jax.models.sampling import keep_nucleus, next_token
from minference_jax.planning.buckets import bucket_length

CONFIG = LlamaConfig(61, 32, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


def model_of(config: LlamaConfig) -> Llama:
    return Llama.from_params(config, {name: jnp.asarray(value) for name, value in random_params(config).items()})


@pytest.fixture(scope="module")
def model() -> Llama:
    return model_of(CONFIG)


def prompt(rng, *shape: int) -> np.ndarray:
    return rng.integers(0, CONFIG.vocab_size, shape)


def test_greedy_equals_full_passes_for_a_batch_of_unequal_lengths(model, rng):
    tokens, lengths = prompt(rng, 3, 200), np.array([200, 128, 5])
    result = generate(model, tokens, lengths, max_new_tokens=9)
    for row, length in enumerate(lengths):
        assert result.tokens[row].tolist() == numpy_greedy(CONFIG, model.params(), tokens[row, :length], 9)
    assert result.tokens.dtype == np.int32 and result.lengths.tolist() == [9, 9, 9]
    assert (result.stats.prompt_tokens, result.stats.generated_tokens, result.stats.decode_steps) == (333, 27, 8)


def test_one_compile_per_bucket(rng):
    model, compiled = model_of(dataclasses.replace(CONFIG, bos_token_id=1)), []  # no other test has this config

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            compiled.append((event, duration_secs))

    for temperature in (0, 1):
        generate(model, prompt(rng, 1, 100), max_new_tokens=7, temperature=temperature)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
        assert len(compiled) > 0  # the listener does hear compilations
        compiled.clear()
        for length, new in zip(
            (1, 2, 31, 64, 77, 99, 100, 126, 127, 128), (3, 128, 7, 64, 65, 5, 1, 9, 33, 2), strict=True
        ):
            result = generate(model, prompt(rng, 1, length), max_new_tokens=new, temperature=new % 3, top_p=0.9)
            assert not result.stats.compiled
        assert compiled == []
        generate(model, prompt(rng, 1, 129), max_new_tokens=2)  # the next bucket
        assert len(compiled) > 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_buckets_are_whole_tiles_and_waste_a_quarter_at_most():
    assert [bucket_length(n) for n in (1, 128, 129, 512, 513, 1024, 1025, 5000)] == [
        *(128, 128, 256, 512, 640, 1024, 1280, 5120)
    ]
    for n in range(1, 5000, 7):
        bucket = bucket_length(n)
        assert bucket % 128 == 0 and n <= bucket <= max(1.25 * n, n + 127) and bucket_length(bucket) == bucket
    assert len({bucket_length(n) for n in range(1, 2**20, 64)}) == 48
    with pytest.raises(ValueError, match="length must be positive"):
        bucket_length(0)


def test_sequences_end_at_eos_and_pad_after(model, rng):
    tokens, lengths = prompt(rng, 2, 60), np.array([60, 33])
    free = generate(model, tokens, lengths, max_new_tokens=20)
    end = int(free.tokens[0, 4])
    stop = [row.tolist().index(end) + 1 if end in row else 20 for row in free.tokens]
    seen = []
    result = generate(
        model, tokens, lengths, max_new_tokens=20, eos_token_ids=(end,), pad_token_id=60, stream=seen.append
    )
    assert result.lengths.tolist() == stop and stop[0] <= 5
    for row in range(2):
        assert result.sequences()[row] == free.tokens[row, : stop[row]].tolist()
        assert np.all(result.tokens[row, stop[row] :] == 60)
        assert [token for part in seen for token in part[row]] == result.sequences()[row]
    assert len(seen) > 2


def test_decoding_stops_early_when_all_have_ended(model, rng):
    tokens = prompt(rng, 1, 60)
    end = int(generate(model, tokens, max_new_tokens=1).tokens[0, 0])
    result = generate(model, tokens, max_new_tokens=100, eos_token_ids=[end])
    assert result.stats.decode_steps == 0 and result.sequences() == [[end]]


def test_sampling_is_repeatable_and_does_not_depend_on_batch_or_stream(model, rng):
    tokens = prompt(rng, 2, 50)
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95, "key": jax.random.key(7)}
    both = generate(model, tokens, **options)
    alone = generate(model, tokens[:1], stream=lambda _: None, **options)
    np.testing.assert_array_equal(both.tokens[0], alone.tokens[0])
    options["key"] = jax.random.key(8)
    other = generate(model, tokens, **options)
    assert np.any(other.tokens != both.tokens)


def test_a_tiny_nucleus_is_greedy(model, rng):
    tokens = prompt(rng, 1, 50)
    np.testing.assert_array_equal(
        generate(model, tokens, max_new_tokens=6, temperature=1.0, top_p=1e-6).tokens,
        generate(model, tokens, max_new_tokens=6).tokens,
    )


def test_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits = jnp.log(jnp.asarray([[0.1, 0.5, 0.15, 0.25]]))
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        got = keep_nucleus(logits, jnp.float32(top_p))
        assert np.flatnonzero(np.isfinite(np.asarray(got[0]))).tolist() == kept


def test_draws_follow_the_distribution():
    logits = jnp.tile(jnp.log(jnp.asarray([[0.6, 0.3, 0.1]])), (4000, 1))
    drawn = next_token(logits, jax.random.key(0), jnp.zeros(4000, jnp.int32), jnp.float32(1), jnp.float32(1))
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, [0.6, 0.3, 0.1], atol=0.03)
    cold = next_token(logits, jax.random.key(0), jnp.zeros(4000, jnp.int32), None, jnp.float32(1))
    assert not np.any(cold)


def test_prefill_in_parts_gives_the_same_and_reports_progress(model, rng):
    tokens, lengths, seen = prompt(rng, 2, 300), np.array([300, 90]), []
    whole = generate(model, tokens, lengths, max_new_tokens=6)
    parts = generate(
        model, tokens, lengths, max_new_tokens=6, prefill_chunk=128, progress=lambda *news: seen.append(news)
    )
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
    assert seen == [(128, 300), (256, 300), (300, 300)]


def test_a_follow_up_turn_processes_only_what_is_new(model, rng):
    tokens = prompt(rng, 2, 300)
    first = generate(model, tokens, max_new_tokens=10)
    turn = np.concatenate([tokens, first.tokens, prompt(rng, 2, 57)], axis=1)
    fresh = generate(model, turn, max_new_tokens=8)
    again = generate(model, turn, max_new_tokens=8, cache=first.cache)
    np.testing.assert_array_equal(again.tokens, fresh.tokens)
    assert again.stats.cached_tokens == 2 * 256 and fresh.stats.cached_tokens == 0
    # An edited history is processed from the edit on, whatever the cache holds.
    turn[1, 140] = (turn[1, 140] + 1) % 61
    edited = generate(model, turn, max_new_tokens=8, cache=again.cache)
    assert edited.stats.cached_tokens == 2 * 128
    np.testing.assert_array_equal(edited.tokens, generate(model, turn, max_new_tokens=8).tokens)


def test_a_conversation_that_outgrows_its_cache_or_waits_on_the_host_goes_on_with_it(model, rng):
    tokens = prompt(rng, 2, 128)
    first = generate(model, tokens, max_new_tokens=4, offload=True)
    assert first.cache.k.sharding.memory_kind == "pinned_host"
    turn = np.concatenate([tokens, first.tokens, prompt(rng, 2, 300)], axis=1)
    again = generate(model, turn, max_new_tokens=4, cache=first.cache)
    assert again.stats.cached_tokens == 2 * 128 and again.cache.k.sharding.memory_kind != "pinned_host"
    np.testing.assert_array_equal(again.tokens, generate(model, turn, max_new_tokens=4).tokens)
    assert first.cache.k.is_deleted()  # there is one cache at a time
    stayed = generate(model, tokens, max_new_tokens=4)
    assert not generate(model, turn, max_new_tokens=4, cache=stayed.cache).stats.compiled  # the same programs
    other = generate(model, prompt(rng, 1, 100), max_new_tokens=2, cache=again.cache)
    assert other.stats.cached_tokens == 0 and again.cache.k.is_deleted()


def test_longrope_is_computed_anew_when_a_sequence_outgrows_its_context(rng):
    rope = RopeConfig(
        kind="longrope",
        factor=8.0,
        original_max_position_embeddings=64,
        short_factor=(1.0, 1.0, 1.0, 1.0),
        long_factor=(1.5, 2.0, 4.0, 8.0),
    )
    config = dataclasses.replace(CONFIG, rope=rope)
    model = model_of(config)
    plain = 10.0 ** -np.arange(4)
    scale = attention_factor(rope)
    tokens, lengths = prompt(rng, 2, 62), np.array([60, 62])
    result = generate(model, tokens, lengths, max_new_tokens=10)

    def frequencies(length: int) -> np.ndarray:
        return plain / np.asarray(rope.short_factor if length <= 64 else rope.long_factor)

    # cos and sin are scaled for q and for k, which the plain model has in its weights instead.
    params = model.params()
    params |= {name: params[name] * scale for name in ("layers.wq", "layers.wk")}
    for row, length in enumerate(lengths):
        expected = numpy_greedy(config, params, tokens[row, :length], 10, frequencies)
        assert result.tokens[row].tolist() == expected
    # Keys that were rotated for the short context are of no use to a longer conversation.
    short = generate(model, prompt(rng, 1, 50), max_new_tokens=2)
    assert generate(model, prompt(rng, 1, 200), max_new_tokens=2, cache=short.cache).stats.cached_tokens == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"prefill_chunk": 100}, "multiple of 128"),
        ({"lengths": [0]}, "lengths must lie between 1 and 5"),
        ({"lengths": [1, 2]}, r"lengths must have shape \(1,\)"),
        ({"tokens": np.zeros((5,), int)}, "tokens must have shape"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer"),
        ({"temperature": "x"}, "temperature must be a number"),
        ({"prefill_chunk": 128.0}, "prefill_chunk must be an integer"),
        ({"cache_dtype": "banana"}, "fp8 or int8; got 'banana'"),
        ({"key": 10**30}, "at most 64 bits"),
    ],
)
def test_bad_arguments_are_named(model, change, message):
    arguments: dict[str, Any] = {"tokens": np.zeros((1, 5), int), "max_new_tokens": 3} | change
    with pytest.raises((ValueError, TypeError), match=message):
        generate(model, arguments.pop("tokens"), **arguments)
