"""The memory formula against what arrays and the compiler take; what fits; advice; dense or sparse by cost."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from numpy_llama import random_llama

from minference_jax.checkpoints.presets import CONFIGS
from minference_jax.cli import main
from minference_jax.models import fp8
from minference_jax.models.cache import KVCache
from minference_jax.models.config import LlamaConfig
from minference_jax.models.forward import rows_at_once
from minference_jax.models.params import param_shapes
from minference_jax.patterns import AShape, BlockSparse, Dense, HeadPatterns, SharedDensity, VerticalSlash
from minference_jax.patterns.base import pairs
from minference_jax.planning import memory
from minference_jax.planning.auto import PAPER_PATTERN, auto_pattern, auto_patterns
from minference_jax.planning.cost import choose_attention
from minference_jax.planning.memory import OutOfDeviceMemoryError, advice, advise, longest_prompt, memory_need
from pallas_kernels.index.fp8 import in_fp8

GIB = 2**30
LLAMA = CONFIGS["llama-3-8b"]
TINY = LlamaConfig(61, 32, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


def bytes_of(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_caches_are_counted_exactly(name):
    config = CONFIGS[name]
    params = {key: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for key, shape in param_shapes(config).items()}
    assert memory_need(config, tokens=128).weights == bytes_of(params)
    narrow = jax.eval_shape(fp8.quantize_params, params)
    assert memory_need(config, tokens=128, fp8_projections=True).weights == bytes_of(narrow)
    for cache, dtype in (("model", jnp.bfloat16), ("fp8", jnp.float8_e4m3fn), ("int8", jnp.int8)):
        shapes = jax.eval_shape(lambda dtype=dtype: KVCache.empty(config, 3, 1000, dtype))
        assert memory_need(config, tokens=1000, batch=3, cache=cache).cache == bytes_of(shapes)


@pytest.mark.parametrize(
    ("options", "gib", "above"),
    # Temporary buffers of the compiled program, vertical-slash with 1,000 columns, XLA for an H100 SXM.
    [
        ({"tokens": 1 << 20, "cache": None}, 28.94, 1.15),
        ({"tokens": 1 << 17, "cache": None}, 3.95, 1.15),
        ({"tokens": 1 << 20, "cache": None, "fp8_projections": True}, 28.77, 1.15),
        ({"tokens": 1 << 20, "cache": "fp8"}, 28.59, 1.15),
        ({"tokens": 1 << 15, "cache": None, "batch": 4}, 6.86, 1.15),
        ({"tokens": 1 << 15, "cache": None, "dtype": "float32"}, 4.94, 1.15),
        ({"tokens": 1 << 15, "cache": None}, 2.47, 1.15),
        ({"tokens": 1 << 15, "cache": None, "fp8_projections": True}, 2.50, 1.2),
        ({"tokens": 1 << 18, "chunk": 32_768}, 2.58, 1.15),
        ({"tokens": 1 << 17, "chunk": 32_768, "batch": 2}, 3.61, 1.15),
    ],
)
def test_activations_are_just_above_what_the_compiler_takes(options, gib, above):
    need = memory_need(LLAMA, **{"patterns": PAPER_PATTERN} | options)
    assert gib <= need.activations / GIB <= above * gib


def test_a_normalised_output_is_counted():
    # XLA for an H100 SXM, of 32K tokens with `auto`: 1.82 and 2.63 GiB.
    for name, gib in (("gemma-3-4b", 1.82), ("glm-4-9b", 2.63)):
        assert gib <= memory_need(CONFIGS[name], tokens=1 << 15, cache=None).activations / GIB <= 1.15 * gib


def test_what_an_index_leaves_beside_the_keys_is_counted():
    # XLA for an H100 SXM, of 128K tokens with `auto`, tiles chosen in FP8: 4.11 GiB, with FP8 projections 3.93.
    for narrow, gib in ((False, 4.11), (True, 3.93)):
        need = memory_need(LLAMA, tokens=1 << 17, patterns="auto", cache=None, fp8_projections=narrow)
        assert gib <= need.activations / GIB <= 1.3 * gib
    rows, keys, heads, every, h = 4096, 8192, 8, 16, 64
    q, k = (jax.ShapeDtypeStruct((1, n, heads, h), jnp.bfloat16) for n in (rows, keys))
    probes = jax.ShapeDtypeStruct((1, rows // 128, 128 // every), jnp.int32)
    _, copied, factors = jax.eval_shape(in_fp8, q, k, probes, probes)
    assert copied.size * copied.dtype.itemsize == keys * heads * h
    logarithms = 4 * heads * (rows // every) * (keys // 64)
    shift = factors.shift.size * 4
    assert SharedDensity(0.2, every=every).index_bytes(rows, keys, heads) >= logarithms + shift


def test_no_rows_are_cut_up_to_a_number_of_all_sequences():
    assert rows_at_once(1, 32_768) == 32_768 and rows_at_once(8, 4_096) == 4_096
    assert rows_at_once(1, 32_769) == rows_at_once(2, 32_768) == 16_384


def test_the_longest_prompt_fits_and_a_longer_one_does_not():
    for options in memory.WAYS.values():
        longest = longest_prompt(LLAMA, 70 * GIB, **options)
        assert memory_need(LLAMA, tokens=longest, **options).total <= 70 * GIB
        assert memory_need(LLAMA, tokens=longest + 128, **options).total > 70 * GIB
    assert longest_prompt(LLAMA, 10 * GIB) == 0
    with pytest.raises(ValueError, match="needs a cache"):
        memory_need(LLAMA, tokens=128, chunk=128, cache=None)


def test_out_of_memory_becomes_advice():
    assert "These fit: cache in FP8: 39" in advice(LLAMA, 50 * GIB, tokens=1 << 18)
    assert "At most 1" in advice(LLAMA, 22 * GIB, tokens=1 << 20)
    with pytest.raises(OutOfDeviceMemoryError, match="200,000 tokens need about"), advise(LLAMA, tokens=200_000):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), advise(LLAMA, tokens=1):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_inspect_says_what_fits(capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert main(["inspect", "llama-3-8b", "--memory", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    assert found["logits only, no cache"]["80 GB"] > 1 << 20
    assert found["cache in FP8"]["141 GB"] > 1 << 20 > found["cache in 16 bits"]["141 GB"]
    assert main(["inspect", "llama-3-8b", "--memory"]) == 0
    assert "141 GB" in capsys.readouterr().out
    assert main(["inspect", "--memory"]) == 2


def test_cells_are_counted():
    assert pairs(4, 4, 4) == 1 + 2 + 3 + 4
    assert pairs(4, 4, 2) == 1 + 2 + 2 + 2
    assert pairs(2, 6, 5) == 5 + 5 and pairs(2, 6, 6) == 5 + 6


def test_short_prompts_are_dense_and_long_ones_sparse():
    patterns = HeadPatterns.uniform(PAPER_PATTERN, LLAMA.num_layers, LLAMA.num_heads)
    for device in ("NVIDIA H100 80GB HBM3", "cpu"):
        chosen = [choose_attention(LLAMA, patterns, 1 << n, 1 << n, device=device).dense for n in range(10, 21)]
        assert chosen[:4] == [True] * 4 and not any(chosen[7:])  # 1K to 8K, 128K to 1M
    short = choose_attention(LLAMA, patterns, 4096, 4096, device="NVIDIA H100 80GB HBM3")
    assert str(short).startswith("dense (predicted") and short.dense_ms < short.sparse_ms
    assert choose_attention(LLAMA, patterns, 4096, 4096, device="NVIDIA H100 80GB HBM3") is short  # remembered
    # A part at the end of a long cache pays earlier than a prompt of its length.
    assert not choose_attention(LLAMA, patterns, 4096, 1 << 18, device="NVIDIA H100 80GB HBM3").dense
    for pattern in (AShape(), BlockSparse(), VerticalSlash()):
        mine = HeadPatterns.uniform(pattern, 1, 32)
        assert not choose_attention(LLAMA, mine, 1 << 18, 1 << 18, device="NVIDIA H100 80GB HBM3").dense
    for every in (1, 64):  # with every row a probe the index costs more than dense attention
        mine = HeadPatterns.uniform(SharedDensity(0.3, every), 1, 32)
        chosen = choose_attention(LLAMA, mine, 1 << 15, 1 << 15, device="NVIDIA H100 80GB HBM3")
        assert chosen.dense == (every == 1)
    assert choose_attention(LLAMA, HeadPatterns.uniform(Dense(), 1, 32), 1 << 18, 1 << 18, device="cpu").dense


def test_auto_takes_tiles_of_one_density_from_8k_tokens_on():
    def choice(keys: int, device: str):
        return choose_attention(LLAMA, auto_patterns(LLAMA.num_layers, 32, keys), keys, keys, device=device)

    assert [choice(1 << n, "NVIDIA H200").dense for n in range(11, 21)] == [True, True] + 8 * [False]
    densities = [pattern.density for n in range(10, 18) if isinstance(pattern := auto_pattern(1 << n), SharedDensity)]
    assert len(densities) == 5 and densities == sorted(densities, reverse=True)
    assert auto_pattern((1 << 17) + 1) == PAPER_PATTERN
    # How much faster than dense attention the operator was on an H200 (notebooks/speed.md), 32 / 8 heads of 128.
    measured = (
        (8, 0.25, 8, 2.39),
        (16, 0.2, 16, 3.60),
        (32, 0.2, 16, 4.07),
        (64, 0.08, 32, 9.34),
        (128, 0.045, 64, 17.4),
    )
    for thousands, density, every, ratio in measured:
        keys = 1024 * thousands
        mine = HeadPatterns.uniform(SharedDensity(density, every), LLAMA.num_layers, 32)
        found = choose_attention(LLAMA, mine, keys, keys, device="NVIDIA H200")
        assert 0.85 < found.dense_ms / found.sparse_ms / ratio < 1.15, keys


def test_auto_uses_the_pattern_of_the_prompts_length():
    model = random_llama(TINY, "auto")
    assert model.patterns is None and model.patterns_at(128) is None
    for keys in (1 << 16, 1 << 17):
        found = model.patterns_at(keys)
        assert found is not None and found.distinct() == [auto_pattern(keys)]
        arrays = model.patterns_for(4096, keys)
        assert arrays is not None and arrays.families == ("shared-density",)
    memory = [memory_need(LLAMA, tokens=1 << 15, patterns=p).total for p in ("auto", auto_pattern(1 << 15))]
    assert memory[0] == memory[1]
    with pytest.raises(ValueError, match="'sparse' is neither"):
        memory_need(LLAMA, tokens=128, patterns="sparse")


def test_auto_runs_the_dense_program_where_that_is_its_choice(rng):
    tokens = jnp.asarray(rng.integers(0, 61, (1, 128)))
    model = random_llama(TINY)
    auto = model.with_patterns("auto")
    choice = auto.attention_choice(128)
    assert choice is not None and choice.dense and model.attention_choice(128) is None
    logits, _, info = auto.prefill(tokens, return_info=True)
    assert info is None and (logits == model.prefill(tokens)[0]).all()
    long = auto.with_fp8_projections().attention_choice(1 << 20)
    assert long is not None and not long.dense


RATED = ("A100-SXM4-80GB", "A10", "L40S", "GeForce RTX 4090", "GeForce RTX 5090", "H100 80GB HBM3", "H200", "B200")


def test_every_generation_of_gpus_has_rates_and_says_where_they_are_from():
    patterns = HeadPatterns.uniform(PAPER_PATTERN, LLAMA.num_layers, LLAMA.num_heads)
    for name in RATED:
        device = f"NVIDIA {name}"
        chosen = [choose_attention(LLAMA, patterns, 1 << n, 1 << n, device=device) for n in range(10, 21)]
        assert chosen[0].dense and not any(choice.dense for choice in chosen[7:]), name  # 1K, 128K to 1M
        source = "measured" if name[0] == "H" else "estimated from its data sheet"
        assert chosen[0].source == source and f"{device}, {source})" in str(chosen[0])
        # The warp-level kernel is further behind dense attention than the Hopper kernel: sparse has to visit less.
        half = HeadPatterns.uniform(BlockSparse(blocks=480), 1, 32)
        assert choose_attention(LLAMA, half, 1 << 16, 1 << 16, device=device).dense == (source != "measured")
    wide = dataclasses.replace(LLAMA, head_dim=256)  # one kernel serves both
    half = HeadPatterns.uniform(AShape(1024, 32_768), 1, 32)
    assert not choose_attention(wide, half, 1 << 16, 1 << 16, device="NVIDIA A100-SXM4-80GB").dense


def test_a_gpu_without_rates_stays_dense_unless_a_tenth_is_visited():
    for device in ("NVIDIA RTX A1000", "NVIDIA L4", "NVIDIA GB10"):
        for blocks, dense in ((64, True), (40, False)):  # 12.5 and 7.8 % of the cells of 64K tokens, and a bit
            choice = choose_attention(
                LLAMA, HeadPatterns.uniform(BlockSparse(blocks), 1, 32), 1 << 16, 1 << 16, device=device
            )
            assert choice.dense == dense and "at most a tenth" in str(choice)
