"""Every public attention function under JAX's settings: the same numbers, gradients included."""

import contextlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_qkv
from jax.sharding import PartitionSpec
from numpy_llama import random_llama

import pallas_kernels as pk
from minference_jax import (
    AShape,
    BlockSparse,
    Dense,
    LlamaConfig,
    PerTile,
    SharedDensity,
    VerticalSlash,
    generate,
    make_plan,
    sparse_attention,
)
from minference_jax.index.recall import recall
from minference_jax.models.checks import check_lengths

PATTERNS = (
    Dense(),
    AShape(2, 70),
    VerticalSlash(columns=6, slashes=6),
    VerticalSlash(columns=6, slashes=6, tiles=1, probes="spread"),
    BlockSparse(1),
    PerTile(every=32, threshold=1e-3),
    SharedDensity(0.6, every=32),
)
SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "NaN": lambda: jax.debug_nans(True),
    "infinities": lambda: jax.debug_infs(True),
    "leaks": jax.checking_leaks,
}
LENGTHS = [200, 130]


def results(pattern, q, k, v):
    """Output and gradients by pattern, and what a plan says of itself."""
    out = sparse_attention(q, k, v, pattern, lengths=LENGTHS, q_offset=0)

    def loss(q, k, v):
        return jnp.sum(sparse_attention(q, k, v, pattern, lengths=LENGTHS) ** 2)

    gradients = jax.grad(loss, (0, 1, 2))(q, k, v)
    plan = make_plan(q, k, pattern, lengths=LENGTHS)
    return out, gradients, plan.density(200, 200, lengths=LENGTHS), recall(q, k, plan, lengths=LENGTHS)


@pytest.fixture(scope="module")
def inputs():
    return random_qkv(np.random.default_rng(0), 2, 200, 200, 2, 1, 8)


@pytest.fixture(scope="module")
def expected(inputs):
    return {pattern: results(pattern, *inputs) for pattern in PATTERNS[2:3]}


@pytest.mark.parametrize("name", SETTINGS)
def test_results_are_the_same_under_a_setting(inputs, expected, name):
    with SETTINGS[name]():
        for pattern, want in expected.items():
            found = results(pattern, *inputs)
            assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(want)]
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_family_is_traced_under_every_setting(inputs, pattern):
    with contextlib.ExitStack() as stack:
        for name in ("x64", "rank promotion", "leaks"):
            stack.enter_context(SETTINGS[name]())
        jax.jit(lambda q, k, v: results(pattern, q, k, v)).trace(*inputs)


def test_models_and_tile_masses_are_traced_under_every_setting(inputs):
    """Numbers of 64 bits are among what they are given: NumPy's own integers."""
    q, k, _ = inputs
    tokens, lengths = np.arange(400).reshape(2, 200), np.array([200, 2**40])
    with contextlib.ExitStack() as stack:
        for name in ("x64", "rank promotion", "leaks"):
            stack.enter_context(SETTINGS[name]())
        model = random_llama(CONFIG, "vertical-slash:columns=3,slashes=3")
        calls = {
            "logits": lambda: model(tokens, lengths),
            "hidden": lambda: model.hidden_states(tokens, lengths),
            "scores": lambda: model.token_log_likelihoods(tokens, lengths),
            "whole": lambda: model.prefill(tokens, lengths, model.init_cache(2, 512), return_info=True)[0],
            "part": lambda: model.prefill(tokens, lengths, model.init_cache(2, 512, "int8"), start=128)[0],
            "decoded": lambda: model.decode(tokens[:, 0], model.init_cache(2, 512, "fp8"))[0],
            "masses": lambda: pk.tile_masses(q, k, *probes, lengths=LENGTHS, return_lse=True),
        }
        probes = jnp.zeros((2, 2, 1), jnp.int32), jnp.ones((2, 2, 1), jnp.float32)
        dtypes = {name: {x.dtype.name for x in jax.tree.leaves(jax.eval_shape(call))} for name, call in calls.items()}
    assert dtypes == {name: {"float32"} for name in calls}
    np.testing.assert_array_equal(check_lengths([7, 2**40], 2), [7, 2**31 - 1])


CONFIG = LlamaConfig(61, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
TOKENS = np.arange(280).reshape(2, 140) % 61


def replies():
    """What a small model says, the model made under the caller's settings too."""
    model = random_llama(CONFIG, "vertical-slash:columns=3,slashes=3")
    prompts = [TOKENS[0].tolist(), TOKENS[1, :77].tolist()]
    answer = generate(model, prompts, max_new_tokens=3, temperature=0.8, top_p=0.9, key=0, cache_dtype="int8")
    return model.with_patterns(None).token_log_likelihoods(TOKENS, [140, 77]), np.asarray(answer.sequences())


def test_a_model_says_the_same_under_every_setting():
    expected = replies()
    with contextlib.ExitStack() as stack:
        for setting in SETTINGS.values():
            stack.enter_context(setting())
        found = replies()
    assert found[0].dtype == jnp.float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_a_model_inside_shard_map_exported_and_refused_in_words():
    model = random_llama(CONFIG, "a-shape:sink=2,window=70")
    tokens, lengths = jnp.asarray(TOKENS, jnp.int32), jnp.asarray([140, 77], jnp.int32)

    def both(tokens, lengths):
        cache = model.init_cache(tokens.shape[0], 256)
        return model.prefill(tokens, lengths, cache)[0], model.token_log_likelihoods(tokens, lengths)

    rows = PartitionSpec("x")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    traced = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(rows, rows), out_specs=rows)).trace(tokens, lengths)
    assert [x.shape for x in traced.out_avals] == [(2, 61), (2, 140)]
    exported = jax.export.deserialize(jax.export.export(jax.jit(both))(tokens, lengths).serialize())
    assert [x.shape for x in exported.out_avals] == [(2, 61), (2, 140)]

    symbols = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, t"), jnp.int32)
    with pytest.raises(ValueError, match="symbolic axes"):
        jax.export.export(jax.jit(model.token_log_likelihoods))(symbols)
    explicit = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit), pytest.raises(ValueError, match=r"Explicit axes.*'x'"):
        model(jax.device_put(tokens, jax.sharding.NamedSharding(explicit, rows)))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_shard_map_with_checked_axes(inputs, pattern):
    """Batch or heads over devices: traced with `check_vma`, gradients of arrays that all devices share included."""
    q, k, v = inputs
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    heads, every = PartitionSpec(None, None, "x"), PartitionSpec()

    def loss(q, k, v):
        return jnp.sum(sparse_attention(q, k, v, pattern) ** 2)

    def both(q, k, v):
        return sparse_attention(q, k, v, pattern), jax.grad(loss, (0, 1, 2))(q, k, v)

    specs = {"in_specs": (heads, every, every), "out_specs": (heads, (heads, every, every))}
    sharded = jax.jit(jax.shard_map(both, mesh=mesh, **specs))
    if pattern != PATTERNS[2]:  # compiling one is enough: the axes are checked while tracing
        sharded.trace(q, k, v)
        return
    found = sharded(q, k, v)
    want = jax.jit(both)(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, want)


def test_an_exported_program_gives_a_plan(inputs):
    q, k, _ = inputs
    exported = jax.export.export(jax.jit(lambda q, k: make_plan(q, k, PATTERNS[2])))(q, k)
    plan = jax.export.deserialize(exported.serialize()).call(q, k)
    assert isinstance(plan, pk.SparsePlan)
    jax.tree.map(np.testing.assert_array_equal, plan, make_plan(q, k, PATTERNS[2]))


def test_export_checkpoint_and_forward_mode(inputs):
    q, k, v = inputs
    pattern = AShape(2, 70)

    def attend(q, k, v):
        return sparse_attention(q, k, v, pattern)

    symbols = jax.export.symbolic_shape("b, t, 2, 8")
    with pytest.raises(ValueError, match="symbolic axes"):
        jax.export.export(jax.jit(attend))(*[jax.ShapeDtypeStruct(symbols, q.dtype)] * 3)

    def loss(q, attend):
        return jnp.sum(attend(q, k, v) ** 2)

    plain, kept = (jax.jit(jax.grad(lambda q, f=f: loss(q, f)))(q) for f in (attend, jax.checkpoint(attend)))
    np.testing.assert_allclose(plain, kept, atol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: attend(q, k, v), (q,), (q,))
