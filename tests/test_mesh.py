"""One model on a mesh: the results of one device, bit for bit; sums over devices in decoding round differently."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import run_command
from jax.sharding import AxisType
from numpy_llama import random_llama
from variants import VARIANTS

from minference_jax.checkpoints.presets import CONFIGS
from minference_jax.models.capture import capture_qkv
from minference_jax.models.config import LlamaConfig
from minference_jax.models.llama import Llama
from minference_jax.parallel import make_mesh
from minference_jax.parallel.deal import deal, slowest
from minference_jax.parallel.mesh import abstract_mesh, parse_mesh
from minference_jax.patterns import AShape, Dense, HeadPatterns
from minference_jax.planning.memory import GPUS, USABLE, longest_prompt, memory_need

DECODE_ATOL = 1e-5


def run(name: str) -> list[str]:
    """The lines that a script beside this file prints. It has eight devices, this process two."""
    command = [sys.executable, str(Path(__file__).with_name(name))]
    child = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


def test_four_and_eight_devices_do_what_one_does():
    found = [line.split() for line in run("mesh_of_eight.py")]
    assert [name for name, _ in found] == ["prefill", "prefill", "pieces", "pieces", "tokens", "cache"]
    assert [float(number) for name, number in found if name in ("prefill", "tokens")] == [0, 0, 0]
    assert max(float(number) for name, number in found if name in ("pieces", "cache")) < DECODE_ATOL


def test_a_long_prefill_sends_what_the_design_says():
    """Of Llama-3-8B and 1M tokens on 8 devices, in the lowered program, whose body of one layer serves all 32."""
    assert run("collectives.py") == [
        "all_gather 16032x4096xbf16 1",  # embeddings
        "all_gather 1x1x16032xf32 1",  # logits of the last row
        "all_reduce 1x1x4096xbf16 1",  # the last row, which one device has
        "all_to_all 8x16384x6x128xbf16 8",  # q, k and v
        "all_to_all 8x1792x4096xbf16 1",  # w_down: a device's slice for each
        "all_to_all 8x1x16384x4x128xbf16 8",  # attention's output, in pieces of a device's rows
        "all_to_all 8x4096x1792xbf16 2",  # w_gate, w_up
        "all_to_all 8x4096x1x128xbf16 2",  # wk, wv
        "all_to_all 8x4096x4x128xbf16 1",  # wq
        "all_to_all 8x4x128x4096xbf16 1",  # wo
    ]


def test_narrow_weights_and_cache_with_dealt_heads():
    config = LlamaConfig(96, 64, 112, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=16)
    uneven = HeadPatterns(((*(Dense(),) * 3, *(AShape(64, 64),) * 5), (Dense(),) * 8))
    tokens = np.random.default_rng(0).integers(0, 96, (1, 555))
    one = random_llama(config).with_fp8_projections().with_patterns(uneven)
    many = one.on(make_mesh())
    assert many.order(555) is not None
    found = [model.prefill(tokens, None, model.init_cache(1, 640, "int8")) for model in (one, many)]
    for expected, same in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(expected, same)


def test_meshes_that_do_not_fit_are_refused():
    config = LlamaConfig(96, 72, 112, num_layers=2, num_heads=9, num_kv_heads=3, head_dim=8)
    model = random_llama(config)
    with pytest.raises(ValueError, match=r"9 query and 3 KV heads .* of 2 devices these fit: rows=2,heads=1"):
        model.on(make_mesh(heads=2))
    assert make_mesh(config=config).shape == {"rows": 1, "heads": 1}
    with pytest.raises(ValueError, match="needs 6 devices; there are 2"):
        make_mesh(rows=2, heads=3)
    with pytest.raises(ValueError, match="must have the axes"):
        model.on(jax.make_mesh((2,), ("x",)))
    explicit = jax.make_mesh((2, 1), ("rows", "heads"), (AxisType.Explicit,) * 2)
    assert model.on(explicit).mesh == model.on(make_mesh(rows=2, heads=1)).mesh  # the mode makes no difference
    for text in ("8", "heads", "heads=0", "columns=2", "heads=2,heads=2"):
        with pytest.raises(ValueError, match="a mesh is written heads=8"):
            parse_mesh(text)
    with pytest.raises(ValueError, match="on a mesh; single layers"):
        capture_qkv(model.on(make_mesh(rows=2, heads=1)), np.zeros((1, 8), np.int32))


def test_heads_are_dealt_by_cost():
    config = LlamaConfig(96, 64, 112, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=8)
    cheap, dear = AShape(64, 64), Dense()
    order = deal(config, HeadPatterns(((dear, dear, dear, cheap, *(cheap,) * 4),)), 4096, 2)
    assert order is not None and sorted(order[0]) == [0, 1, 2, 3]
    assert {0, 1} not in ({*order[0][:2]}, {*order[0][2:]})  # the dear groups are apart
    costs = np.array([[5.0, 4.0, 1.0, 1.0]])
    assert slowest(costs, None, 2) == 9 and slowest(costs, np.array([[0, 2, 1, 3]]), 2) == 6
    even = HeadPatterns(((cheap, dear) * 4,))
    assert deal(config, even, 4096, 2) is None and deal(config, even, 4096, 1) is None


def test_each_device_needs_its_share_of_the_memory():
    config = CONFIGS["llama-3-8b"]
    one, many = (memory_need(config, tokens=2**20, mesh=mesh) for mesh in (None, abstract_mesh("heads=8", config)))
    norms = 2 * (2 * config.num_layers + 1) * config.hidden_size
    assert many.weights == (one.weights - norms) // 8 + norms
    assert many.cache == one.cache // 8
    assert one.activations / 8 < many.activations < one.activations / 4
    with pytest.raises(ValueError, match="of 16 devices these fit: rows=2,heads=8, rows=4,heads=4"):
        memory_need(config, tokens=128, mesh=abstract_mesh("heads=16", config))


def test_commands_take_a_mesh(tmp_path, capsys):
    status, out, err = run_command(capsys, "inspect", "llama-3-8b", "--memory", "--mesh", "heads=8", "--json")
    assert status == 0, err
    many = json.loads(out)["longest prompt in tokens, by GPU, of llama-3-8b on heads=8"]
    one = longest_prompt(CONFIGS["llama-3-8b"], USABLE * GPUS["80 GB"] * 2**30, cache="model")
    assert many["cache in 16 bits"]["80 GB"] > 4 * one
    (tmp_path / "config.json").write_text(json.dumps(LlamaConfig(61, 32, 40, 1, 4, 2, 8).to_hf()))
    command = ["bench", "prefill", "--random-weights", tmp_path, "--methods", "dense", "--json", "--lengths", "256"]
    status, out, err = run_command(capsys, *command, "--repeats", 1, "--mesh", "heads=2")
    assert status == 0, err
    found = json.loads(out)
    assert found["mesh"] == "heads=2" and found["rows"][0]["seconds"] > 0 and found["rows"][0]["attention"] is None
    for options in (["--mesh", "heads=0"], ["--mesh", "rows=2,heads=2"], ["--hosts", "auto"]):
        assert run_command(capsys, *command, *options)[0] == 2


@pytest.mark.parametrize(
    ("name", "axis"), [("gpt_oss", "heads"), ("gpt_oss", "rows"), ("olmo3", "heads"), ("glm4_moe", "heads")]
)
def test_what_lies_with_the_heads_on_two_devices(rng, name, axis):
    """gpt-oss: its sinks, and each expert's width over all devices. OLMo 3: the norm over all heads of q.

    GLM-4.5: layers of two kinds."""
    config = LlamaConfig.from_hf(VARIANTS[name])
    params = Llama.random(config, jax.random.key(0)).params()
    for own in {"layers.sinks", "layers.wide_q_norm", "layers.wide_k_norm"} & params.keys():
        params[own] = jax.numpy.asarray(rng.standard_normal(params[own].shape), "float32")
    one = Llama.from_params(config, params)
    two = one.on(make_mesh(**({"heads": 2} if axis == "heads" else {"rows": 2, "heads": 1})))
    tokens = rng.integers(0, config.vocab_size, (1, 300))
    (expected, cache), (got, cut) = (model.prefill(tokens, None, model.init_cache(1, 384)) for model in (one, two))
    np.testing.assert_allclose(got, expected, atol=DECODE_ATOL)
    following = np.argmax(expected, axis=-1).astype(np.int32)
    expected, got = one.decode(following, cache)[0], two.decode(following, cut)[0]
    np.testing.assert_allclose(got, expected, atol=DECODE_ATOL)
