"""Rotary embeddings: each kind's frequencies against numbers worked out by hand, and what rotation must preserve."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.models import LlamaConfig, RopeConfig
from minference_jax.models.rope import LayerRope, apply_rope, attention_factor, inverse_frequencies, turns


def config(head_dim: int = 8, **rope) -> LlamaConfig:
    return LlamaConfig(7, 16, 16, 1, 2, 1, head_dim, rope=RopeConfig(**rope))


def frequencies(of: LlamaConfig, *lengths: int) -> np.ndarray:
    return np.asarray(inverse_frequencies(of, jnp.asarray(lengths or (1,), jnp.int32)))


def tables(of, frequencies, positions):
    return turns(of, LayerRope(frequencies, attention_factor(of.rope)), positions)[:2]


def test_default_and_linear():
    # θ = 10⁴ and 4 pairs: θ^(-2j/8) = 10^(-j).
    np.testing.assert_allclose(frequencies(config()), [[1, 0.1, 0.01, 0.001]], rtol=1e-6)
    np.testing.assert_allclose(
        frequencies(config(kind="linear", factor=4.0)), [[0.25, 0.025, 0.0025, 0.00025]], rtol=1e-6
    )


def test_dynamic_grows_theta_with_each_sequences_own_length():
    rope = config(kind="dynamic", factor=3.0, original_max_position_embeddings=100)
    # Twice the trained length: θ · (3 · 2 - 2)^(8/6) = 10⁴ · 4^(4/3).
    theta = 1e4 * 4 ** (4 / 3)
    expected = [[1, 0.1, 0.01, 0.001], theta ** -np.array([0, 0.25, 0.5, 0.75])]
    np.testing.assert_allclose(frequencies(rope, 60, 200), expected, rtol=1e-5)


def test_llama3_keeps_short_waves_divides_long_ones_and_blends_between():
    # Wavelengths are 2π · 10^j = 6.28, 62.8, 628, 6283. Trained on 1000: short < 250, long > 1000.
    rope = config(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=1000
    )
    share = (1000 / (2 * math.pi * 100) - 1) / 3
    np.testing.assert_allclose(frequencies(rope), [[1, 0.1, 0.01 * ((1 - share) / 8 + share), 0.001 / 8]], rtol=1e-5)


def test_yarn_ramps_from_extrapolation_to_interpolation():
    # A pair turns 32 times in 1000 tokens at j = 8 · ln(1000 / 64π) / (2 ln 10⁴) = 0.69, and once at 2.2.
    # Rounded outwards: ramp from j = 0 to 3, so pair j keeps 1 - j/3 of its own frequency.
    rope = config(kind="yarn", factor=4.0, original_max_position_embeddings=1000)
    keep = 1 - np.arange(4) / 3
    np.testing.assert_allclose(frequencies(rope), [10.0 ** -np.arange(4) * (keep + (1 - keep) / 4)], rtol=1e-5)
    assert attention_factor(rope.rope) == pytest.approx(0.1 * math.log(4) + 1)
    ratio = dataclasses.replace(rope.rope, mscale=0.5, mscale_all_dim=2.0)
    assert attention_factor(ratio) == pytest.approx((0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1))
    assert attention_factor(dataclasses.replace(rope.rope, attention_factor=0.7)) == 0.7


def test_longrope_switches_factors_by_each_sequences_own_length():
    rope = config(
        kind="longrope",
        factor=4.0,
        original_max_position_embeddings=64,
        short_factor=(1.0, 1.0, 2.0, 2.0),
        long_factor=(1.0, 2.0, 4.0, 8.0),
    )
    short, long = [1, 0.1, 0.005, 0.0005], [1, 0.05, 0.0025, 0.000125]
    np.testing.assert_allclose(frequencies(rope, 64, 65), [short, long], rtol=1e-6)
    assert attention_factor(rope.rope) == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))


def test_rotation_is_multiplication_by_a_unit_complex_number(rng):
    x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
    cos, sin = tables(config(), jnp.asarray(frequencies(config())), jnp.arange(5, dtype=jnp.int32)[None])
    got = np.asarray(apply_rope(jnp.asarray(x), cos, sin))
    angles = np.arange(5)[:, None] * np.array([1, 0.1, 0.01, 0.001])
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[None, :, None]
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=1e-5)
    np.testing.assert_array_equal(got[:, 0], x[:, 0])  # position 0 does not turn


def test_scores_depend_on_distance_only(rng):
    q, k = rng.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)
    f = jnp.asarray(frequencies(config()))

    def at(x, position):
        return np.asarray(apply_rope(jnp.asarray(x), *tables(config(), f, jnp.full((1, 1), position, jnp.int32))))

    near, far = (np.sum(at(q, p + 7) * at(k, p)) for p in (0, 1000))
    np.testing.assert_allclose(near, far, rtol=1e-3)


def test_partial_rotation_passes_the_rest_and_keeps_the_dtype(rng):
    half = config(head_dim=16, partial_rotary_factor=0.5)
    assert half.rotary_dim == 8
    x = jnp.asarray(rng.standard_normal((1, 3, 1, 16)), jnp.bfloat16)
    cos, sin = tables(half, jnp.asarray(frequencies(half)), jnp.arange(3, dtype=jnp.int32)[None])
    got = apply_rope(x, cos, sin)
    assert got.dtype == jnp.bfloat16 and cos.shape == (1, 3, 4)
    np.testing.assert_array_equal(np.asarray(got[..., 8:], np.float32), np.asarray(x[..., 8:], np.float32))
    assert np.any(np.asarray(got[:, 1:, :, :8] != x[:, 1:, :, :8]))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "spiral"}, "must be one of"),
        ({"theta": 0.0}, "rope_theta must be finite and positive"),
        ({"kind": "yarn", "factor": 2.0}, "needs original_max_position_embeddings"),
        ({"kind": "longrope", "original_max_position_embeddings": 8}, "needs short_factor"),
    ],
)
def test_malformed_rope_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)
