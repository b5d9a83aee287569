"""The table of families: configs there and back, mutated ones, unsupported models by name, weights in MXFP4."""

import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, random_tensors
from helpers import run_command as run
from safetensors.numpy import save_file
from variants import FAMILIES, VARIANTS

from minference_jax.checkpoints import mxfp4
from minference_jax.checkpoints.convert import load_checkpoint, open_checkpoint
from minference_jax.models import LlamaConfig, families
from minference_jax.models.config import LayerKind


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_is_the_same_after_it_was_written(name):
    config = LlamaConfig.from_hf(VARIANTS[name])
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_layers_have_kinds():
    smollm3 = LlamaConfig.from_hf(VARIANTS["smollm3"])
    assert [kind.rope for kind in smollm3.layer_kinds] == ["main", "main", "main", "none"] and not smollm3.windowed
    gemma3 = LlamaConfig.from_hf(VARIANTS["gemma3"])
    local = LayerKind(window=True, rope="local")
    assert gemma3.layer_kinds == (local, LayerKind(), local) and gemma3.sliding_window == 37
    assert gemma3.local_rope is not None and (gemma3.rope.factor, gemma3.local_rope.kind) == (8.0, "default")


def test_the_text_model_of_a_model_of_pictures_and_text():
    inner = {key: value for key, value in VARIANTS["gemma3"].items() if key not in ("model_type", "eos_token_id")}
    outer = {"model_type": "gemma3", "text_config": inner, "vision_config": {}, "eos_token_id": [1, 106]}
    config = LlamaConfig.from_hf(outer)
    assert (config.model_type, config.eos_token_ids) == ("gemma3_text", (1, 106))
    with pytest.raises(ValueError, match="'mistral4' is not supported"):
        LlamaConfig.from_hf({"model_type": "mistral3", "text_config": {"model_type": "mistral4"}})


# A family, a key of its config.json, a value that no model has, and what the error says.
MUTATED = [
    ("gqa4", "hidden_size", "64", "hidden_size must be a positive integer, got '64'"),
    ("gqa4", "num_hidden_layers", 10**30, "num_hidden_layers must be"),
    ("gqa4", "num_hidden_layers", 10**9, "num_hidden_layers 1,000,000,000"),
    ("gqa4", "rms_norm_eps", None, "rms_norm_eps is missing"),
    ("gqa4", "rms_norm_eps", float("nan"), "rms_norm_eps must be finite"),
    ("gqa4", "rope_theta", [1], "rope_theta must be a number"),
    ("gqa4", "rope_scaling", "yarn", "rope_scaling must be a dictionary"),
    ("gqa4", "rope_scaling", {"rope_type": ["yarn"]}, "rope_type"),
    ("gqa4", "rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "one RoPE for all layers; got full_"),
    ("gqa4", "attention_bias", 3, "attention_bias must be true or false"),
    ("gqa4", "eos_token_id", ["</s>"], "eos_token_id must be a token's number"),
    ("gqa4", "quantization_config", {"quant_method": "mxfp4"}, "mxfp4 .a quantized checkpoint"),
    ("mistral_window", "sliding_window", -1, "sliding_window must be a positive integer"),
    ("smollm3", "no_rope_layers", [1], "no_rope_layers must hold 0 or 1 for each of 4 layers"),
    ("smollm3", "no_rope_layers", [1, 0, "x", 1], "no_rope_layers must hold"),
    ("smollm3", "no_rope_layer_interval", 0, "no_rope_layer_interval must be a positive integer"),
    ("smollm3", "layer_types", ["full_attention"], "layer_types must name"),
    ("seed_oss", "attention_out_bias", "no", "attention_out_bias must be true or false"),
    ("ministral3", "rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "llama_4_scaling_beta must be"),
    ("granite", "logits_scaling", 0, "logits_scaling must be positive"),
    ("granite", "residual_multiplier", None, "residual_multiplier is missing"),
    ("glm4", "partial_rotary_factor", 1.5, "partial_rotary_factor must be in"),
    ("qwen3_moe", "num_experts_per_tok", 7, "7 experts serve a token"),
    ("qwen3_moe", "num_experts", None, "num_experts is missing"),
    ("qwen3_moe", "norm_topk_prob", 1, "norm_topk_prob must be true or false"),
    ("qwen3_moe", "decoder_sparse_step", 2, "decoder_sparse_step 2 .only 1"),
    ("gemma3", "layer_types", "full_attention", "layer_types must name"),
    ("gemma3", "rope_parameters", {"rope_theta": 1e6}, "rope_parameters must hold full_attention"),
    ("gemma3", "query_pre_attn_scalar", -256, "query_pre_attn_scalar must be positive"),
    ("gemma3", "use_bidirectional_attention", True, "use_bidirectional_attention True"),
    ("gemma3", "hidden_activation", "gelu", "hidden_activation 'gelu'"),
    ("gpt_oss", "swiglu_limit", 3.0, "swiglu_limit 3.0"),
    ("gpt_oss", "num_local_experts", 2.5, "num_local_experts must be a positive integer"),
]


@pytest.mark.parametrize(("name", "key", "value", "message"), MUTATED, ids=lambda value: str(value)[:30])
def test_a_mutated_config_gives_an_error_that_names_the_key(name, key, value, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(VARIANTS[name] | {key: value})


# What may lie beside the config.json of a model that is not supported.
BESIDE = (
    {},
    {"model.safetensors": "junk", "pytorch_model.bin": "junk"},
    {"generation_config.json": "[1", "tokenizer.json": "{"},
    {"adapter_config.json": "{}", "params.json": "{}"},
    {"model.gguf": "GGUF", "model.safetensors.index.json": "[]"},
)


def test_every_unsupported_model_is_named_whatever_its_files_are(tmp_path):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = [name for name in CONFIG_MAPPING if name not in (*families.FAMILIES, *families.WRAPPERS)]
    assert len(names) > 500
    for place, files in enumerate(BESIDE):
        directory = tmp_path / str(place)
        directory.mkdir()
        for file, text in files.items():
            (directory / file).write_text(text)
        for name in names[place :: len(BESIDE)]:
            content = {"model_type": name, "vocab_size": "?", "text_config": {"model_type": "llama"}}
            (directory / "config.json").write_text(json.dumps(content))
            with pytest.raises(ValueError, match=rf"^[^\n]*model_type '{re.escape(name)}' is not supported[^\n]*$"):
                open_checkpoint(directory)


def test_inspect_prints_a_config_to_be_read(capsys):
    status, out, _ = run(capsys, "inspect", "glm-4.5-air")
    assert status == 0 and "experts (number 128, chosen 8" in " ".join(out.split()) and "46 layers" not in out
    status, out, _ = run(capsys, "inspect", "gemma-3-270m")
    assert "15 layers: window True, rope local; 3 layers: plain" in " ".join(out.split()) and "traits" in out


@pytest.mark.parametrize("name", ["qwen3_next", "whisper", None, ["llama"]])
def test_inspect_says_so_in_one_sentence(tmp_path, capsys, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, "vocab_size": "?", "text_config": []}))
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    status, out, news = run(capsys, "inspect", tmp_path)
    assert status == 1 and not out and f"model_type {name!r} is not supported" in news and "Traceback" not in news


def as_mxfp4(numbers, powers):
    """Blocks and scales of a weight [e, in, out], given as codes of 4 bits and exponents of its groups of 32."""
    codes = numbers.swapaxes(1, 2).reshape(*numbers.shape[::2], -1, 32)
    return codes[..., ::2] | codes[..., 1::2] << 4, (powers + 127).astype(np.uint8)


def test_experts_in_mxfp4_are_read_as_their_values(tmp_path, rng):
    config = CONFIG | {"model_type": "gpt_oss", "hidden_size": 32, "intermediate_size": 64, "attention_bias": True}
    config |= {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 128}
    config["quantization_config"] = {"quant_method": "mxfp4"}
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    plain, packed = random_tensors(config), {}
    for name, tensor in list(plain.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            e, inside, out = tensor.shape
            numbers = rng.integers(0, 16, tensor.shape).astype(np.uint8)
            powers = rng.integers(-4, 3, (e, out, inside // 32))
            scale = 2.0 ** np.repeat(powers, 32, axis=-1).swapaxes(1, 2)
            plain[name] = (table[numbers] * scale).astype(np.float32)
            packed[f"{name}{mxfp4.BLOCKS}"], packed[f"{name}{mxfp4.SCALES}"] = as_mxfp4(numbers, powers)
        else:
            packed[name] = tensor
    for kind, tensors in (("plain", plain), ("packed", packed)):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps(config))
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path / kind / "model.safetensors")
    expected, got = (load_checkpoint(tmp_path / kind, dtype="float32")[1] for kind in ("plain", "packed"))
    assert got["layers.expert_gate"].dtype == jnp.float32 and list(got) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert np.abs(np.asarray(got["layers.expert_up"]).astype(ml_dtypes.bfloat16)).max() > 1
