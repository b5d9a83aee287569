"""Whether sparse attention pays, predicted from a config: against what was measured, and the command."""

import dataclasses
import json

import pytest
from helpers import run_command

from minference_jax import PerTile, VerticalSlash
from minference_jax.checkpoints.presets import CONFIGS
from minference_jax.patterns import HeadPatterns
from minference_jax.patterns.rates import RATES
from minference_jax.planning.outlook import MEMORY, other_operations, outlook, room

LLAMA = CONFIGS["llama-3.1-8b"]


@pytest.mark.parametrize(
    ("tokens", "dense", "sparse"),
    [(8192, 0.220, 0.202), (16384, 0.506, 0.399), (32768, 1.231, 0.829), (65536, 3.359, 1.675), (131072, 11.12, 3.403)],
)
def test_predictions_are_near_what_was_measured(tokens, dense, sparse):
    """Llama-3-8B's shape in bfloat16 on an H200, by `bench prefill` with `auto`; the rest of a layer is an estimate."""
    found = outlook(LLAMA, tokens, "H200")
    assert found.dense_seconds == pytest.approx(dense, rel=0.15)
    assert found.sparse_seconds == pytest.approx(sparse, rel=0.15)
    assert found.pays


def test_operations_are_two_a_weight_that_serves_a_token():
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert other_operations(LLAMA) == 2 * layers
    experts = CONFIGS["gpt-oss-20b"]
    assert 6e9 < other_operations(experts) < 8e9  # 3.6 of 21 billion weights are active, embeddings among them


def test_short_prompts_do_not_pay_and_long_ones_have_to_fit():
    assert not outlook(LLAMA, 2048, "A100").pays
    every = HeadPatterns.uniform(VerticalSlash(columns=64, tiles=4), 32, 32)
    few = outlook(LLAMA, 131072, "A100", patterns=every)
    assert few.pays and few.patterns is every and few.gain > outlook(LLAMA, 131072, "A100").gain
    assert outlook(LLAMA, 8192, "A10").fits is not None
    assert outlook(LLAMA, 1 << 20, "A10").fits is None
    way, memory = outlook(LLAMA, 1 << 19, "H100").fits or ("", 0.0)
    assert "FP8" in way and memory < MEMORY["H100"]
    assert outlook(LLAMA, 1 << 19, "H200").fits is not None and set(MEMORY) == set(RATES)
    longest = room(LLAMA, "A10")
    assert (
        max(longest.values()) < 1 << 20
        and room(LLAMA, "A10", batch=4)["cache in 16 bits"] < longest["cache in 16 bits"]
    )
    wide = HeadPatterns.uniform(PerTile(1, 1e-5), 32, 32)
    assert room(LLAMA, "A10", patterns=wide)["cache in 16 bits"] < longest["cache in 16 bits"]
    with pytest.raises(ValueError, match="gpu must be one of H100, H200"):
        outlook(dataclasses.replace(LLAMA), 8192, "V100")


def test_the_command_advises(capsys):
    status, out, _ = run_command(capsys, "advise", "llama-3-8b", "--lengths", "2K,128K", "--gpu", "a100")
    assert status == 0 and "2,048 tokens" in out and "Dense is as fast" in out and "Sparse pays" in out
    assert "estimated from its data sheet" in out and "own context is 8,192 tokens" in out
    status, out, _ = run_command(capsys, "advise", "llama-3-8b", "--lengths", "2K", "--gpu", "B200", "--json")
    found = json.loads(out)
    assert status == 0 and found["gpu"] == "B200" and found["lengths"][0]["pattern"] == "dense"
    options = ["--lengths", "2K", "--pattern", "per-tile:every=1,threshold=1e-5", "--json"]
    wide = json.loads(run_command(capsys, "advise", "llama-3-8b", "--gpu", "B200", *options)[1])
    assert wide["longest_prompts"]["cache in FP8"] < found["longest_prompts"]["cache in FP8"]
    for option, value, message in (
        ("--gpu", "V100", "'--gpu': gpu must be one of"),
        ("--pattern", "dense", "--pattern: dense attention"),
        ("--batch", "100000", "--batch"),
    ):
        status, _, error = run_command(capsys, "advise", "llama-3-8b", option, value)
        assert status == 2 and message.replace("'", "") in error
