"""Mixtures of experts: blocks of sorted rows against one expert after another, in float32 and with FP8 weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from minference_jax.models import LlamaConfig, fp8
from minference_jax.models.config import Experts, Traits
from minference_jax.models.experts import mixture
from minference_jax.models.stacked import StackedLayer

MIXTURE = jax.jit(mixture, static_argnums=0)


def config_of(experts):
    return LlamaConfig(61, 8, 40, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, traits=Traits(experts=experts))


def weights_of(rng, experts, d=8):
    shapes = {"router": (d, experts.number), "expert_gate": (experts.number, d, experts.width)}
    shapes |= {"expert_up": shapes["expert_gate"], "expert_down": (experts.number, experts.width, d)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def one_by_one(experts, layer, x):
    scores = x @ layer["router"]
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    out = np.zeros_like(x)
    for row, share in enumerate(shares):
        chosen = np.argsort(-share)[: experts.chosen]
        total = share[chosen].sum() if experts.normalized else 1
        for e in chosen:
            gate, up = (x[row] @ layer[name][e] for name in ("expert_gate", "expert_up"))
            out[row] += share[e] / total * (gate / (1 + np.exp(-gate)) * up @ layer["expert_down"][e])
    return out


@pytest.mark.parametrize("rows", [1, 37, 300], ids=lambda rows: f"{rows}_rows")
@pytest.mark.parametrize("normalized", [True, False])
def test_blocks_give_what_experts_one_by_one_give(rng, rows, normalized):
    """37 rows need blocks that end inside an expert; with 300 rows some expert has several blocks."""
    experts = Experts(number=5, chosen=2, width=6, normalized=normalized)
    layer, x = weights_of(rng, experts), rng.standard_normal((rows, 8)).astype(np.float32)
    layer["router"][:, 3] *= 0 if rows == 37 else 1  # an expert that serves few
    got = MIXTURE(config_of(experts), layer, jnp.asarray(x)[None])[0]
    np.testing.assert_allclose(got, one_by_one(experts, layer, x), atol=1e-4)


def test_stacked_and_fp8_weights_give_the_same_and_almost_the_same(rng):
    experts = Experts(number=4, chosen=2, width=16, normalized=True)
    layer, x = weights_of(rng, experts), jnp.asarray(rng.standard_normal((1, 9, 8)), jnp.float32)
    stacked = {f"layers.{name}": jnp.stack([value, 2 * value]) for name, value in layer.items()}
    plain = {name.removeprefix("layers."): value for name, value in stacked.items()}
    expected = MIXTURE(config_of(experts), layer, x)
    got = jax.jit(lambda i: mixture(config_of(experts), StackedLayer(plain, i), x))(jnp.int32(0))
    np.testing.assert_array_equal(got, expected)
    narrow = {name.removeprefix("layers."): value[0] for name, value in fp8.quantize_params(stacked).items()}
    assert narrow["expert_down"].shape == (4, 8, 16) and narrow["expert_down_scale"].shape == (4, 8)
    assert 0.001 < relative_error(MIXTURE(config_of(experts), narrow, x), expected) < 0.1
