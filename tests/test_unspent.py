"""Layers of a model that leave a part of their density to later layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy_llama import random_params

from minference_jax import AShape, Llama, LlamaConfig, SharedDensity, make_plan, sparse_attention
from minference_jax.eval.baselines import Dilated
from minference_jax.parallel import make_mesh
from minference_jax.patterns import HeadPatterns

CONFIG = LlamaConfig(64, 64, 96, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16)
LENGTHS = jnp.asarray([2048, 1500], jnp.int32)
THRESHOLD = 2 / 2048


@pytest.fixture(scope="module")
def model():
    """Random weights; queries and keys of the last two layers are large, so that their attention is uneven."""
    params = random_params(CONFIG)
    factor = np.asarray([0.3, 0.3, 8.0, 8.0], np.float32)[:, None, None, None]
    return Llama.from_params(CONFIG, params | {name: params[name] * factor for name in ("layers.wq", "layers.wk")})


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 2048), 0, CONFIG.vocab_size, jnp.int32)


def densities(model, pattern, tokens, lengths=LENGTHS):
    """Of each layer and sequence."""
    found = model.with_patterns(pattern).prefill(tokens, lengths, return_info=True)
    return np.asarray(found[-1].density).mean(-1)


def test_what_a_layer_leaves_is_spent_by_later_layers_and_no_more(model, tokens):
    plain = densities(model, SharedDensity(0.45, 16, threshold=0), tokens)
    shared = densities(model, SharedDensity(0.45, 16, threshold=THRESHOLD), tokens)
    np.testing.assert_allclose(plain, 0.45, atol=0.01)
    assert (shared.mean(0) <= 0.45 + 1e-3).all()
    assert shared[:2, 0].max() < 0.44  # even layers leave something
    assert shared[2:, 0].min() > 0.455  # which uneven ones take
    spent = np.cumsum(shared, axis=0) / np.arange(1, 5)[:, None]
    assert (spent <= 0.45 + 1e-3).all()


def test_each_sequence_has_its_own_remainder(model, tokens):
    pattern = SharedDensity(0.45, 16, threshold=THRESHOLD)
    together = densities(model, pattern, tokens)
    alone = densities(model, pattern, tokens[1:, :1500], LENGTHS[1:])
    np.testing.assert_allclose(together[:, 1:], alone, atol=2e-3)


def test_devices_that_share_the_heads_agree_on_it(model, tokens):
    pattern = SharedDensity(0.45, 16, threshold=THRESHOLD)
    on_two = densities(model.on(make_mesh(heads=2)), pattern, tokens)
    np.testing.assert_allclose(on_two, densities(model, pattern, tokens), atol=1e-6)


def test_heads_of_other_families_neither_leave_nor_take(model, tokens):
    shared = SharedDensity(0.45, 16, threshold=THRESHOLD)
    mixed = HeadPatterns(((AShape(sink=64, window=128), shared, shared, AShape(sink=64, window=128)),) * 4)
    found = np.asarray(model.with_patterns(mixed).prefill(tokens, LENGTHS, return_info=True)[-1].density)
    assert (found[:, :, 1:3].mean((0, 2)) <= 0.45 + 1e-3).all()
    np.testing.assert_array_equal(found[:, :, 0], np.broadcast_to(found[:1, :, 0], found[:, :, 0].shape))


def test_a_layer_of_few_such_heads_leaves_little_to_one_of_many(model, tokens):
    few, shared = AShape(sink=64, window=128), SharedDensity(0.45, 16, threshold=THRESHOLD)
    layers = HeadPatterns(((shared, few, few, few), (shared,) * 4, (shared,) * 4, (few, shared, shared, few)))
    found = np.asarray(model.with_patterns(layers).prefill(tokens, LENGTHS, return_info=True)[-1].density)
    own = np.asarray([[p == shared for p in layer] for layer in layers.layers])[:, None]
    spent = np.cumsum(np.where(own, found, 0).sum(-1), axis=0)
    assert (spent <= 0.45 * np.cumsum(own.sum(-1), axis=0) + 4e-3).all()


def test_one_call_with_a_remainder_says_what_is_left(rng):
    q, k = (jnp.asarray(rng.standard_normal((1, 1024, n, 16)), jnp.float32) for n in (4, 2))
    layer = HeadPatterns.uniform(SharedDensity(0.5, 16, threshold=0.9 / 1024), 1, 4).arrays().layer(0)
    given = dataclasses.replace(layer, unspent=jnp.asarray([0.2], jnp.float32))
    out, info, left = jax.jit(lambda q, k: sparse_attention(q, k, k, given, return_info=True))(q, k)
    np.testing.assert_allclose(left, 2.2 - info.density.sum(-1), atol=1e-5)
    assert out.shape == q.shape
    assert layer.begin(1) is not None
    assert HeadPatterns.uniform(AShape(sink=64, window=64), 1, 4).arrays().begin(1) is None


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_beside_a_plan_builder_each_device_has_the_remainder_of_its_sequences(rng, kind):
    """A builder sees all heads; the budgets of a part of a prompt are of each sequence too."""
    q, k = (jnp.asarray(3 * rng.standard_normal((2, 512, n, 16)), jnp.float32) for n in (4, 2))
    lengths, shared = jnp.asarray([512, 400], jnp.int32), SharedDensity(0.6, 64, threshold=0)
    heads = (Dilated(sink=2, near=64, far=64, stride=2), shared, shared, AShape(sink=64, window=256))
    layer = HeadPatterns((heads,)).arrays().layer(0).for_part(lengths // 2, lengths)
    plans = []
    for unspent in ([0.4, 0.0], [0.0, 0.0]):
        layer = dataclasses.replace(layer, unspent=jnp.asarray(unspent, jnp.float32))
        plans.append(jax.jit(make_plan)(q, k, layer, lengths=lengths))
    more = (plans[0].block_count - plans[1].block_count)[:, 1:3].sum((1, 2))
    assert more[0] > 0 and more[1] == 0
    layer = dataclasses.replace(layer, unspent=jnp.asarray([0.4, 0.0], jnp.float32))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    spread = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("x"))) for x in (q, k)]
    jax.tree.map(np.testing.assert_array_equal, jax.jit(make_plan)(*spread, layer, lengths=lengths), plans[0])
    with pytest.raises(ValueError, match="a plan builder sees all heads of a layer, which axis_name='x' divides"):
        make_plan(q, k, layer, axis_name="x")


@pytest.mark.parametrize("threshold, expected", [(None, 0.12 / (0.25 * 1024)), (1e-3, 1e-3), (0, 0.0)])
def test_the_threshold_follows_the_density_and_each_sequences_length(rng, threshold, expected):
    q, k = (jnp.asarray(3 * rng.standard_normal((2, 2048, n, 16)), jnp.float32) for n in (4, 2))
    lengths = jnp.asarray([1024, 2048], jnp.int32)
    pattern = SharedDensity(0.25, 16, threshold=threshold)
    mine = make_plan(q, k, pattern, lengths=lengths)
    explicit = make_plan(q, k, SharedDensity(0.25, 16, threshold=expected), lengths=lengths)
    np.testing.assert_array_equal(mine.block_count[0], explicit.block_count[0])


@pytest.mark.parametrize("threshold", [1.0, -0.1, float("nan"), True, "a"])
def test_thresholds_that_are_none(threshold):
    with pytest.raises((TypeError, ValueError), match="threshold"):
        SharedDensity(0.25, threshold=threshold)
