"""One model on two devices: the results of one, bit for bit; sums over devices in decoding round differently."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from minference_jax.models.config import LlamaConfig
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama
from minference_jax.parallel import make_mesh
from minference_jax.patterns import AShape, Dense, HeadPatterns, SharedDensity

CONFIG = LlamaConfig(96, 64, 112, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=16)
# Devices have to agree on the cells that the heads of a layer share, and on whether all of them are dense. The dear
# heads come first, so that KV groups are dealt in another order.
SHARE, DIAGONAL = SharedDensity(0.4), AShape(64, 64)
UNEVEN = HeadPatterns(((Dense(), Dense(), Dense(), SHARE, DIAGONAL, DIAGONAL, SHARE, DIAGONAL), (Dense(),) * 8))
DECODE_ATOL = 1e-5


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(heads=2)


@pytest.fixture(scope="module")
def prompts():
    """Two prompts of odd lengths, the first shorter by more than a query tile."""
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 555)), np.array([555 - 140, 555])


def largest(one, many):
    """The largest difference of two trees of arrays."""
    assert jax.tree.structure(one) == jax.tree.structure(many)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    return max(float(np.max(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)))) for a, b in pairs)


@pytest.mark.parametrize("patterns", [None, UNEVEN], ids=["dense", "uneven"])
def test_prefill_is_that_of_one_device(mesh, prompts, patterns):
    one = Llama.random(CONFIG, jax.random.key(0), patterns=patterns)
    many = one.on(mesh)
    assert (many.order(555) is None) == (patterns is None)
    found = [
        model.prefill(*prompts, model.init_cache(2, 640), return_info=patterns is not None) for model in (one, many)
    ]
    assert largest(*found) == 0
    assert found[1][1].k.sharding.shard_shape(found[1][1].k.shape) == (2, 2, 640, 2, 16)


def test_generation_in_parts_and_a_second_turn(mesh, prompts):
    one = Llama.random(CONFIG, jax.random.key(0))
    many = one.on(mesh)
    tokens, lengths = prompts
    said, found = [], []
    for model in (one, many):
        first = generate(model, tokens, lengths, max_new_tokens=64, prefill_chunk=256, eos_token_ids=())
        said.append([*tokens[1], *first.sequences()[1], 3, 5])
        again = [*tokens[0][: lengths[0]], *first.sequences()[0], 7]
        found.append(generate(model, [again, said[-1]], max_new_tokens=8, prefill_chunk=256, cache=first.cache))
        assert found[-1].stats.cached_tokens >= 2 * 256
    assert said[0] == said[1]
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    assert largest(found[0].cache, found[1].cache) < DECODE_ATOL


def test_narrow_weights_and_cache(mesh, prompts):
    one = Llama.random(CONFIG, jax.random.key(0)).with_fp8_projections()
    many = one.on(mesh)
    (last, cache), (expected, reference) = (m.prefill(*prompts, m.init_cache(2, 640, "int8")) for m in (many, one))
    assert largest((expected, reference), (last, cache)) == 0
    token = np.argmax(last, -1)
    found, other = many.decode(token, cache)[0], one.decode(token, reference)[0]
    # Each device rounds its own part of a row to FP8, which moves logits as FP8 itself does.
    assert float(np.linalg.norm(found - other) / np.linalg.norm(other)) < 0.1


def test_log_likelihoods_and_logits_of_every_row(mesh, prompts):
    one = Llama.random(CONFIG, jax.random.key(0))
    many = one.on(mesh)
    assert largest(*(model.token_log_likelihoods(*prompts) for model in (one, many))) == 0
    assert largest(*(model(*prompts) for model in (one, many))) == 0


def test_meshes_that_do_not_fit_are_refused(mesh):
    config = LlamaConfig(96, 63, 112, num_layers=2, num_heads=9, num_kv_heads=3, head_dim=7)
    model = Llama.random(config, jax.random.key(0))
    with pytest.raises(ValueError, match=r"9 query and 3 KV heads .* of 2 devices these fit: rows=2,heads=1"):
        model.on(mesh)
    assert make_mesh(config=config).shape == {"rows": 1, "heads": 1}
    with pytest.raises(ValueError, match="needs 6 devices; there are 2"):
        make_mesh(rows=2, heads=3)


def test_four_and_eight_devices(tmp_path):
    """In a child process, since this one has two."""
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name("mesh_of_eight.py")], capture_output=True, text=True, timeout=500
    )
    assert child.returncode == 0, child.stderr
    rows = [line.rpartition(": ")[2].split() for line in child.stdout.splitlines()]
    assert len(rows) == 4
    for exact, close in rows:
        assert float(exact) == 0 and float(close) < DECODE_ATOL, child.stdout


def test_a_long_prefill_sends_what_the_design_says():
    """Of Llama-3-8B and 1M tokens on 8 devices, in the lowered program, whose body of one layer serves all 32."""
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name("collectives.py")], capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    rows = 2**20 // 8
    assert child.stdout.splitlines() == [
        "all_gather 1024x4096xbf16 1",
    ], rows
