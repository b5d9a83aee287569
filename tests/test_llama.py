"""The Llama module against a plain NumPy one, and what must not change its results: padding, chunks, batch, jit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy_llama import numpy_llama, random_params

from minference_jax.models import LlamaConfig, RopeConfig, forward
from minference_jax.models.checks import resolve_patterns
from minference_jax.models.config import Traits
from minference_jax.models.llama import Llama
from minference_jax.patterns import AShape, Dense, HeadPatterns, VerticalSlash

BASE = LlamaConfig(61, 32, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
VARIANTS = {
    "gqa2": BASE,
    "mha_tied": dataclasses.replace(BASE, num_kv_heads=4, tie_embeddings=True),
    "mqa_bias": dataclasses.replace(BASE, num_kv_heads=1, traits=Traits(qkv_bias=True)),
    "qk_norm_wide_heads": dataclasses.replace(BASE, head_dim=12, traits=Traits(qk_norm=True), rms_norm_eps=0.1),
    "linear_rope": dataclasses.replace(BASE, rope=RopeConfig(kind="linear", theta=100.0, factor=2.0)),
}


def model_of(config: LlamaConfig, **more) -> Llama:
    return Llama.from_params(config, {k: jnp.asarray(v) for k, v in random_params(config).items()}, **more)


def prompt(rng, *shape: int) -> np.ndarray:
    return rng.integers(0, BASE.vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_hidden_states_equal_the_plain_model(name, rng):
    config = VARIANTS[name]
    model, tokens = model_of(config), prompt(rng, 37)
    frequencies = None
    if config.rope.kind == "linear":
        frequencies = config.rope.theta ** (-np.arange(0, 8, 2) / 8) / config.rope.factor
    expected = numpy_llama(config, model.params(), tokens, frequencies)
    got = model(jnp.asarray(tokens[None]))
    assert got.dtype == jnp.float32 and got.shape == (1, 37, 61)
    np.testing.assert_allclose(got[0], expected["logits"], atol=2e-5)
    if name == "gqa2":
        np.testing.assert_allclose(model.hidden_states(jnp.asarray(tokens[None]))[:, 0], expected["hidden"], atol=2e-5)


def test_padding_and_company_change_nothing(rng):
    model = model_of(BASE)
    tokens, lengths = prompt(rng, 3, 40), np.array([40, 17, 1])
    together = model(jnp.asarray(tokens), jnp.asarray(lengths))
    last, _ = model.prefill(jnp.asarray(tokens), jnp.asarray(lengths))
    for row, length in enumerate(lengths):
        alone = numpy_llama(BASE, model.params(), tokens[row, :length])["logits"]
        np.testing.assert_allclose(together[row, :length], alone, atol=2e-5)
        np.testing.assert_allclose(last[row], alone[-1], atol=2e-5)
    assert np.isfinite(np.asarray(together)).all()


def test_length_dependent_rope_follows_each_row(rng):
    rope = RopeConfig(kind="dynamic", factor=2.0, original_max_position_embeddings=16)
    model, tokens = model_of(dataclasses.replace(BASE, rope=rope)), prompt(rng, 2, 40)
    together = model(jnp.asarray(tokens), jnp.asarray([40, 12]))
    for row, length, theta in ((0, 40, 1e4 * (2 * 40 / 16 - 1) ** (8 / 6)), (1, 12, 1e4)):
        frequencies = theta ** (-np.arange(0, 8, 2) / 8)
        alone = numpy_llama(BASE, model.params(), tokens[row, :length], frequencies)["logits"]
        np.testing.assert_allclose(together[row, :length], alone, atol=2e-5)


@pytest.mark.parametrize("chunk", [8, 15])
def test_chunks_of_any_size_give_the_same(chunk, rng):
    model, tokens = model_of(BASE), jnp.asarray(prompt(rng, 2, 40))
    expected, _ = model.prefill(tokens)
    got, _ = model.prefill(tokens, rows_at_once=chunk)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_bfloat16_weights_compute_in_bfloat16_and_give_float32_logits(rng):
    model = model_of(BASE)
    half = Llama.from_params(BASE, {k: v.astype(jnp.bfloat16) for k, v in model.params().items()})
    tokens = jnp.asarray(prompt(rng, 1, 30))
    assert half.dtype == jnp.bfloat16 and half.hidden_states(tokens).dtype == jnp.bfloat16
    got = half(tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, model(tokens), atol=0.15)


def test_log_likelihoods_are_those_of_the_logits(rng, monkeypatch):
    monkeypatch.setattr(forward, "LOGIT_CHUNK", 16)
    config = dataclasses.replace(BASE, rms_norm_eps=1e-4)  # one that no other test has compiled, for the patch to act
    model, tokens, lengths = model_of(config), prompt(rng, 2, 40), np.array([40, 25])
    log_p = np.asarray(jax.nn.log_softmax(model(jnp.asarray(tokens), jnp.asarray(lengths))))
    got = np.asarray(model.token_log_likelihoods(jnp.asarray(tokens), jnp.asarray(lengths)))
    for row, length in enumerate(lengths):
        expected = [log_p[row, i - 1, tokens[row, i]] for i in range(1, length)]
        np.testing.assert_allclose(got[row, 1:length], expected, atol=1e-5)
    assert got[0, 0] == 0 and np.all(got[1, 25:] == 0)


def test_one_layer_is_compiled_whatever_the_depth():
    def program(layers: int) -> int:
        model = model_of(dataclasses.replace(BASE, num_layers=layers))
        return jax.jit(model).lower(jnp.zeros((1, 8), jnp.int32)).as_text().count("dot_general")

    assert program(2) == program(9) > 0


def test_works_under_jit_and_nnx_jit(rng):
    model, tokens = model_of(BASE), jnp.asarray(prompt(rng, 1, 20))
    expected = model(tokens)
    np.testing.assert_allclose(jax.jit(lambda t: model(t))(tokens), expected, atol=1e-6)
    np.testing.assert_allclose(nnx.jit(lambda m, t: m(t))(model, tokens), expected, atol=1e-6)
    graph, state = nnx.split(model)
    np.testing.assert_allclose(nnx.merge(graph, state)(tokens), expected, atol=1e-6)


def test_random_weights_are_repeatable_and_normalised():
    config = dataclasses.replace(BASE, hidden_size=64, traits=Traits(qkv_bias=True))
    one, two = (Llama.random(config, jax.random.key(3), "bfloat16").params() for _ in range(2))
    assert all(bool(jnp.all(one[name] == two[name])) for name in one)
    assert one["layers.wq"].dtype == jnp.bfloat16
    assert float(jnp.std(one["layers.w_gate"].astype(jnp.float32))) == pytest.approx(1 / 8, rel=0.1)
    assert bool(jnp.all(one["layers.attn_norm"] == 1)) and not bool(jnp.any(one["layers.bq"]))


def test_a_pattern_that_covers_everything_equals_dense(rng):
    model, tokens = model_of(BASE), jnp.asarray(prompt(rng, 2, 300))
    lengths = jnp.asarray([300, 170])
    heads = (AShape(sink=1, window=400), VerticalSlash(columns=400, slashes=400), Dense(), Dense())
    sparse = model.with_patterns(HeadPatterns((heads, heads[::-1])))
    expected, _ = model.prefill(tokens, lengths)
    got, _, info = sparse.prefill(tokens, lengths, return_info=True)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert info.density.shape == info.recall.shape == (2, 2, 4)
    np.testing.assert_allclose(info.density, 1.0, atol=1e-5)
    assert sparse.params()["embed"] is model.params()["embed"]


def test_a_narrow_pattern_sees_less(rng):
    model, tokens = model_of(BASE), jnp.asarray(prompt(rng, 1, 500))
    narrow = model.with_patterns(AShape(sink=1, window=64))
    logits, cache, info = narrow.prefill(tokens, None, model.init_cache(1, 512), return_info=True)
    assert float(info.density.max()) < 0.7
    assert float(jnp.abs(logits - model.prefill(tokens)[0]).max()) > 1e-3
    assert int(cache.lengths[0]) == 500
    assert model.with_patterns(Dense()).layer_patterns is None


def test_bad_arguments_are_named(rng, unchecked):
    model = model_of(BASE)
    params = model.params()
    tokens = jnp.asarray(prompt(rng, 2, 10))
    with pytest.raises(ValueError, match=r"embed is missing; nonsense is unexpected"):
        Llama.from_params(BASE, {k: v for k, v in params.items() if k != "embed"} | {"nonsense": params["embed"]})
    with pytest.raises(ValueError, match=r"final_norm has shape \(31,\) instead of \(32,\)"):
        Llama.from_params(BASE, params | {"final_norm": params["final_norm"][1:]})
    with pytest.raises(ValueError, match="dtypes must be one of"):
        Llama.from_params(BASE, params | {"embed": params["embed"].astype(jnp.bfloat16)})
    with pytest.raises(ValueError, match="patterns are for 3 layers of 4 heads; the model has 2 layers of 4 heads"):
        model.with_patterns(HeadPatterns.uniform(Dense(), 3, 4))
    with pytest.raises(TypeError, match="patterns must be"):
        model.with_patterns(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens must have shape"):
        model(tokens[0])
    with pytest.raises(TypeError, match="tokens must be integers"):
        model(tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"lengths must have shape \(2,\)"):
        model(tokens, jnp.asarray([3]))
    with pytest.raises(ValueError, match="multiple of 128"):
        model.prefill(tokens, None, model.init_cache(2, 256), start=100)
    with pytest.raises(ValueError, match="exceed the cache's 256 positions"):
        model.prefill(tokens, None, model.init_cache(2, 256), start=256)
    with pytest.raises(ValueError, match="do not fit a cache of 3 x 256"):
        model.prefill(tokens, None, model.init_cache(3, 256))
    with pytest.raises(ValueError, match="start needs the cache"):
        model.prefill(tokens, start=128)


def test_patterns_by_preset_name():
    patterns = resolve_patterns("streaming-llm", BASE.num_layers, BASE.num_heads)
    assert patterns == HeadPatterns.uniform(AShape(sink=1024, window=4096), BASE.num_layers, BASE.num_heads)
