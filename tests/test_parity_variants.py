"""Every switch of a Llama-family config against Hugging Face PyTorch, on small random models.

PyTorch writes the models, runs each row by itself and without padding, and writes what it got, all in one process.
Ours reads the same files and runs the rows as one padded batch.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from torch_env import torch_python
from variants import FAMILIES, VARIANTS

from minference_jax.compare import Outputs, Tolerance, compare
from minference_jax.compare.comparison import compare_outputs
from minference_jax.compare.jax_side import run_jax
from minference_jax.compare.outputs import write_inputs
from minference_jax.compare.torch_process import run_torch_jobs
from minference_jax.models.llama import Llama
from minference_jax.patterns import AShape

# Longer than a query tile, shorter than the 64 positions where some RoPE variants change over, and in between.
LENGTHS = np.array([150, 60, 131], np.int32)
POSITIONS = range(150)
NEW_TOKENS = 8
MORE_TOKENS = 32  # of the families
# transformers 4 and 5 lay RoPE out differently in config.json; these are written as version 5 does.
NEW_LAYOUT = {
    "rope_linear",
    "rope_llama3",
    "rope_yarn_tuned",
    "phi3_longrope",
    "phi3_partial_rotary",
    "qwen3_tied_yarn",
    *("ministral3", "gemma3", "gpt_oss", "qwen3_moe", "glm4_moe", "olmo2"),
}
IN_SHARDS = {"tied", "phi3_longrope"}


@pytest.fixture(scope="module")
def models(tmp_path_factory, request):
    """A directory with one model a variant that is tested, and PyTorch's results in its folder `torch`."""
    python = torch_python()
    root, jobs = tmp_path_factory.mktemp("variants"), []
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    tested = {item.callspec.params["name"] for item in here} | {"gqa4"}
    rng = np.random.default_rng(0)
    for seed, (name, config) in enumerate(VARIANTS.items()):
        if name not in tested:
            continue
        model = root / name
        create = {"kind": "create", "model": str(model), "config": config, "seed": seed}
        create |= {"keep_config": name not in NEW_LAYOUT, "max_shard_size": "50KB" if name in IN_SHARDS else "1GB"}
        run = {"kind": "run", "model": str(model), "output": str(model / "torch"), "dtype": "float32", "device": "cpu"}
        run |= {"attention": "eager" if seed % 2 else "sdpa", "chunk": 64, "layers": True}
        run |= {"positions": list(POSITIONS), "new_tokens": MORE_TOKENS if name in FAMILIES else NEW_TOKENS}
        write_inputs(model / "torch", rng.integers(3, config["vocab_size"], (3, 150)), LENGTHS)
        jobs += [create, run]
    # One thread: these models are so small that a second one only waits.
    run_torch_jobs(jobs, torch_python=python, threads=1, timeout=300)
    return root


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_hidden_states_and_greedy_tokens_are_those_of_pytorch(models, name):
    model, ours, theirs = models / name, models / name / "jax", models / name / "torch"
    new_tokens = MORE_TOKENS if name in FAMILIES else NEW_TOKENS
    tokens = np.load(theirs / "tokens.npy")
    write_inputs(ours, tokens, LENGTHS)
    run_jax(Llama.from_pretrained(model, dtype="float32"), ours, positions=POSITIONS, new_tokens=new_tokens, chunk=150)
    result = compare_outputs(
        *(Outputs.load(ours), Outputs.load(theirs)),
        tokens=tokens,
        lengths=LENGTHS,
        positions=POSITIONS,
        model=name,
        dtype="float32",
        patterns=None,
        versions={},
        tolerance=Tolerance(logit_max=1e-4, argmax=0.99, greedy=True, perplexity=1e-5),
    )
    assert result.failures == ()
    assert result.largest_lost_margin <= 1e-4  # of two tokens nearer than that either may be first
    assert result.positions == LENGTHS.sum()
    assert max(layer.max for layer in result.layers) <= 1e-4
    # The models must be able to tell: logits near one, and continuations that differ between rows.
    assert result.logit_scale > 0.2 and len(set(result.greedy_torch)) == 3


@pytest.mark.parametrize("name", ["smollm3_window", "ministral3", "gemma3", "gpt_oss"])
def test_a_prompt_in_parts_gives_the_same_continuation(models, name):
    """Two parts of 128 rows against the cache: windows, positions and sinks across their border, then decoding."""
    theirs = Outputs.load(models / name / "torch")
    tokens = jnp.pad(jnp.asarray(np.load(models / name / "torch" / "tokens.npy")[:1]), ((0, 0), (0, 106)))
    model = Llama.from_pretrained(models / name, dtype="float32")
    last, cache = model.prefill(tokens, jnp.asarray([150]), model.init_cache(1, 256), chunk=128)
    np.testing.assert_allclose(last[0], theirs.logits[0, 149], atol=1e-4)
    for step in range(3):
        following = jnp.argmax(last, axis=-1).astype(jnp.int32)
        np.testing.assert_array_equal(following, theirs.greedy[:1, step])
        last, cache = model.decode(following, cache)


def test_the_layouts_and_shards_are_there(models):
    """That the files have the forms which the variants claim to cover."""
    layouts = {path.name: json.loads((path / "config.json").read_text()) for path in models.iterdir()}
    assert {name for name, config in layouts.items() if "rope_parameters" in config} == NEW_LAYOUT & layouts.keys()
    assert {path.parent.name for path in models.glob("*/model.safetensors.index.json")} == IN_SHARDS & layouts.keys()


def test_the_entry_points_of_the_model_agree_with_pytorch(models):
    """Call, hidden_states, token_log_likelihoods, prefill and decode, on a padded batch."""
    theirs = Outputs.load(models / "gqa4" / "torch")
    tokens = jnp.asarray(np.load(models / "gqa4" / "torch" / "tokens.npy"))
    model, lengths = Llama.from_pretrained(models / "gqa4", dtype="float32"), jnp.asarray(LENGTHS)
    logits, hidden = model(tokens, lengths), model.hidden_states(tokens, lengths)
    scores = model.token_log_likelihoods(tokens, lengths)
    expected = theirs.next_logit - theirs.logsumexp
    last, cache = model.prefill(tokens, lengths, model.init_cache(3, 150 + NEW_TOKENS))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row, :length], theirs.logits[row, :length], atol=1e-4)
        np.testing.assert_allclose(hidden[:, row, :length], theirs.hidden[row, :, :length], atol=1e-4)
        np.testing.assert_allclose(scores[row, 1:length], expected[row, : length - 1], atol=1e-4)
        np.testing.assert_allclose(last[row], theirs.logits[row, length - 1], atol=1e-4)
    for step in range(NEW_TOKENS):
        following = jnp.argmax(last, axis=-1).astype(jnp.int32)
        np.testing.assert_array_equal(following, theirs.greedy[:, step])
        last, cache = model.decode(following, cache)


def test_compare_tells_what_sparsity_costs(models):
    """A window of two key tiles: the first rows see everything they would see, later ones do not."""
    tokens = np.load(models / "gqa4" / "torch" / "tokens.npy")
    options = {"lengths": LENGTHS, "max_new_tokens": 4, "torch_python": torch_python(), "threads": 1}
    result = compare(models / "gqa4", tokens, patterns=AShape(sink=1, window=1), **options, positions=range(40))
    assert result.patterns == "AShape(sink=1, window=1)" and result.tolerance == Tolerance(perplexity=0.05)
    assert result.logit_max <= 1e-4 and result.tokens == LENGTHS.sum() and result.positions == 3 * 40
    assert abs(result.perplexity_ours / result.perplexity_torch - 1) > 1e-4
