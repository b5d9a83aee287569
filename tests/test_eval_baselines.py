"""The baselines' plans against masks written out in NumPy, and in a model in the patterns' place."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_qkv
from numpy_llama import random_params

from minference_jax.attention import make_plan
from minference_jax.eval.baselines import BigBird, Dilated, Longformer, StaticPlan, TopKOracle, tile_masses
from minference_jax.index.recall import recall
from minference_jax.models import LlamaConfig
from minference_jax.models.llama import Llama
from minference_jax.patterns import AShape, BlockSparse, VerticalSlash

CONFIG = LlamaConfig(61, 32, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
T = 600


@pytest.fixture
def qkv(rng):
    return random_qkv(rng, 2, T, T, 4, 2, 16)


@partial(jax.jit, static_argnums=0)
def both_of(pattern, q, k, lengths):
    plan = make_plan(q, k, pattern, lengths=lengths)
    return plan.to_mask(q.shape[1], k.shape[1], lengths=lengths), plan


def mask_of(pattern, q, k, lengths=None):
    mask, plan = both_of(pattern, q, k, lengths)
    return np.asarray(mask), plan


def rows_and_keys(t):
    return np.arange(t)[:, None], np.arange(t)[None]


def test_dilated_takes_every_second_tile_of_its_far_window(qkv):
    row, key = rows_and_keys(T)
    first = row // 128 * 128  # of the query tile
    for pattern, bands in (
        (Dilated(sink=3, near=0, far=256, stride=2), [128, 256]),
        (Dilated(sink=3, near=64, far=256, stride=2), [64, 192, 320]),
        (Dilated(sink=3, near=100, far=100, stride=1), [64, 128, 192, 256]),
    ):
        expected = (key < 3) | (key >= first)
        for band in bands:
            expected |= (key >= first - band) & (key < first - band + 64)
        mask, _ = mask_of(pattern, *qkv[:2])
        np.testing.assert_array_equal(mask[1, 3], expected & (key <= row))


def test_longformer_is_a_shape_with_a_question_that_sees_all(qkv):
    lengths = jnp.asarray([T, 300], jnp.int32)
    mask, _ = mask_of(Longformer(window=130, sink=5, question=20), *qkv[:2], lengths)
    a_shape, _ = mask_of(AShape(sink=5, window=130), *qkv[:2], lengths)
    row, key = rows_and_keys(T)
    for sequence, length in enumerate((T, 300)):
        sees_all = (row // 128 * 128 + 128 > length - 20) & (row < length) & (key <= row)
        np.testing.assert_array_equal(mask[sequence, 0], a_shape[sequence, 0] | sees_all)
    without, _ = mask_of(Longformer(window=130, sink=5, question=0), *qkv[:2], lengths)
    np.testing.assert_array_equal(without, a_shape)


def test_big_bird_adds_tiles_that_differ_by_head_and_do_not_depend_on_the_batch_or_the_chunk(qkv):
    q, k, _ = qkv
    pattern = BigBird(window=65, sink=5, question=0, random=2, seed=3)
    mask, plan = mask_of(pattern, q, k)
    plain, _ = mask_of(Longformer(window=65, sink=5, question=0), q, k)
    assert np.all(mask | ~plain)
    extra = np.asarray(plan.block_count[0])  # [n, i]
    assert extra[:, 0].tolist() == [0] * 4 and np.all(extra[:, 1:] >= 1) and np.all(extra <= 2)
    assert not np.array_equal(mask[0, 0], mask[0, 1]) and np.array_equal(mask[0], mask[1])
    part = jax.jit(lambda: make_plan(q[:, 256:], k, pattern, q_offset=256).to_mask(T - 256, T, q_offset=256))()
    np.testing.assert_array_equal(part, mask[:, :, 256:])


def test_tile_masses_are_the_sums_of_the_softmax(rng):
    q, k, _ = random_qkv(rng, 2, 200, 200, 4, 2, 16)
    lengths = jnp.asarray([200, 150], jnp.int32)
    mass = tile_masses(q, k, lengths=lengths, q_offset=jnp.int32(0), scale=0.25)
    scores = np.einsum("tnh,snh->nts", q[1], np.repeat(k[1], 2, axis=1)) * 0.25
    weights = np.exp(scores) * np.tri(200)
    weights = weights / weights.sum(-1, keepdims=True) * (np.arange(200) < 150)[:, None]
    weights = np.pad(weights, ((0, 0), (0, 56), (0, 56))).reshape(4, 2, 128, 4, 64).sum((2, 4))
    np.testing.assert_allclose(mass[1], weights, atol=1e-4)


def test_the_oracle_holds_more_than_any_index_at_its_density(rng):
    q, k, _ = random_qkv(rng, 1, 1024, 1024, 2, 1, 16)
    q = 3 * q  # peaked, so that there is something to choose

    @partial(jax.jit, static_argnums=0)
    def measure(pattern):
        plan = make_plan(q, k, pattern)
        return plan.density(1024, 1024), recall(q, k, plan)

    density, held = measure(TopKOracle(0.5))
    assert np.all(density <= 0.5) and np.all(density > 0.48)
    for pattern in (AShape(sink=32, window=65), BlockSparse(4), VerticalSlash(columns=32, tiles=1)):
        cost, less = measure(pattern)
        assert np.all(cost <= density) and np.all(less < held)


def test_a_model_takes_a_plan_builder_in_the_patterns_place(rng):
    params = {name: jnp.asarray(value) for name, value in random_params(CONFIG).items()}
    tokens = jnp.asarray(rng.integers(0, 61, (2, 300)))
    window = Llama.from_params(CONFIG, params, AShape(sink=8, window=65))
    same = window.with_patterns(Longformer(window=65, sink=8, question=0))
    assert same.patterns is not None and len(same.patterns.builders) == 1
    expected, _, _ = window.prefill(tokens, return_info=True)
    logits, _, info = same.prefill(tokens, return_info=True)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert info.density.shape == (2, 2, 4) and np.all(info.density < 1)


def test_static_indices_are_those_of_the_other_prompt(rng):
    params = {name: jnp.asarray(value) for name, value in random_params(CONFIG).items()}
    dense = Llama.from_params(CONFIG, params)
    tokens = jnp.asarray(rng.integers(0, 61, (3, 500)))
    pattern = VerticalSlash(columns=6, tiles=2)
    static = StaticPlan.of_prompt(dense, tokens[:1], pattern)
    kept = dense.with_patterns(static)
    own = make_plan(*random_qkv(rng, 3, 500, 500, 4, 2, 8)[:2], jax.tree.map(lambda x: x[0], static))
    assert own.columns.shape[:2] == (3, 4)
    np.testing.assert_array_equal(own.columns[2], static.plan.columns[0, 0])
    hidden = [np.asarray(model.hidden_states(tokens)) for model in (kept, dense.with_patterns(pattern))]
    # The index was taken from a dense run: in the first layer it is what its own prompt finds.
    np.testing.assert_allclose(hidden[0][:2, 0], hidden[1][:2, 0], atol=1e-5)
    assert not np.allclose(hidden[0][1, 1:], hidden[1][1, 1:], atol=1e-3)
    with pytest.raises(ValueError, match="block-sparse"):
        StaticPlan.of_prompt(dense, tokens[:1], BlockSparse(3))
    with pytest.raises(ValueError, match="the model has 2 layers"):
        dense.with_patterns(jax.tree.map(lambda x: x[:1], static))


def test_the_oracle_needs_a_density():
    with pytest.raises(ValueError, match="density must be"):
        TopKOracle(0.0)
