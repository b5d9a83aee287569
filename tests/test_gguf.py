"""GGUF files: metadata to config, names and row order to parameters."""

import gguf
import numpy as np
import pytest
from checkpoints import CONFIG, random_tensors
from gguf_files import gguf_tensors, load, write_gguf

# What differs from CONFIG in a config.json of each family, and what its GGUF file says beside the common keys.
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
_MSCALE = {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
_YARN_KEYS = [
    ("add_rope_scaling_type", gguf.RopeScalingType.YARN),
    ("add_rope_scaling_factor", 4.0),
    ("add_rope_scaling_orig_ctx_len", 256),
]
_MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 1.7,
}
_OLMO3 = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS = [("add_expert_count", 3), ("add_expert_used_count", 2)]
FAMILIES = {
    "llama": ({"attention_bias": True, "mlp_bias": True}, []),
    "qwen2": ({}, []),
    "qwen3": ({}, []),
    "phi3": ({}, []),
    "smollm3": ({"num_hidden_layers": 4}, []),
    "seed_oss": ({"attention_bias": True}, []),
    "ministral3": (
        {"rope_scaling": _YARN | _MSCALE},
        [*_YARN_KEYS, ("add_rope_scaling_yarn_log_mul", 1.0), ("add_attn_temperature_scale", 0.1)],
    ),
    "granite": (
        _MULTIPLIERS,
        [
            ("add_attention_scale", 0.2),
            ("add_embedding_scale", 3.0),
            ("add_residual_scale", 0.4),
            ("add_logit_scale", 1.7),
        ],
    ),
    "qwen3_moe": (
        {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 7, "norm_topk_prob": True},
        [*_EXPERTS, ("add_expert_feed_forward_length", 7)],
    ),
    "gemma3_text": (
        {
            "num_hidden_layers": 3,
            "sliding_window_pattern": 6,
            "sliding_window": 512,
            "query_pre_attn_scalar": 4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "hidden_activation": "gelu_pytorch_tanh",
        },
        [
            ("add_sliding_window", 512),
            ("add_rope_scaling_type", gguf.RopeScalingType.LINEAR),
            ("add_rope_scaling_factor", 8.0),
        ],
    ),
    "gpt_oss": (
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "sliding_window": 128,
            "attention_bias": True,
            "rope_scaling": _YARN | {"truncate": False},
        },
        [*_EXPERTS, *_YARN_KEYS, ("add_sliding_window", 128), ("add_expert_feed_forward_length", 5)],
    ),
    "glm4_moe": (
        {
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "n_routed_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 7,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.7,
            "first_k_dense_replace": 1,
        },
        [
            *_EXPERTS,
            ("add_expert_feed_forward_length", 7),
            ("add_expert_shared_count", 1),
            ("add_expert_weights_scale", 1.7),
            ("add_expert_weights_norm", True),
            ("add_leading_dense_block_count", 1),
            ("add_rope_dimension_count", 2),
        ],
    ),
    "olmo2": ({}, []),
    "olmo3": (
        {"num_hidden_layers": 3, "sliding_window": 64, "layer_types": _OLMO3, "rope_scaling": _YARN},
        [
            ("add_sliding_window", 64),
            ("add_sliding_window_pattern", [kind == "sliding_attention" for kind in _OLMO3]),
            *_YARN_KEYS,
        ],
    ),
    "glm4": ({"attention_bias": True, "partial_rotary_factor": 0.5}, [("add_rope_dimension_count", 2)]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_and_hugging_face_give_the_same_parameters(tmp_path, family):
    from checkpoints import write_hf

    changes, extra = FAMILIES[family]
    config = CONFIG | {"model_type": family, "sliding_window": None, "pad_token_id": None} | changes
    tensors = random_tensors(config)
    expected_config, expected = load(write_hf(tmp_path / "hf", tensors, config))
    path = write_gguf(tmp_path / "model.gguf", gguf_tensors(tensors, config), config, extra)
    actual_config, actual = load(path)
    assert actual_config == expected_config
    assert list(actual) == list(expected)
    for name, param in expected.items():
        # Gemma's files have one added to the weights of norms.
        tolerance = 1e-6 if family == "gemma3_text" and name.endswith("norm") else 0
        np.testing.assert_allclose(actual[name], param, atol=tolerance, rtol=0, err_msg=name)


def test_llama_rows_are_put_back_in_order(tmp_path):
    """One head of 4: the file's rows 0 1 2 3 are Hugging Face's 0 2 1 3."""
    tensors = gguf_tensors(random_tensors(CONFIG), CONFIG)
    _, params = load(write_gguf(tmp_path / "model.gguf", tensors))
    in_file = tensors["blk.0.attn_k.weight"]
    np.testing.assert_array_equal(np.asarray(params["layers.wk"])[0, :, 0].T, in_file[[0, 2, 1, 3]])


def test_missing_output_weight_means_tied_embeddings(tmp_path):
    tensors = gguf_tensors(random_tensors(CONFIG), CONFIG)
    del tensors["output.weight"]
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "only.gguf", tensors)
    config, params = load(tmp_path / "model")  # a directory with one GGUF file is as good as the file
    assert config.tie_embeddings
    assert "lm_head" not in params


def test_directory_with_two_files_is_ambiguous(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); name one"):
        load(tmp_path)


def llama3_divisors(theta, factor, dims):
    """As the Llama 3.1 model code scales its frequencies, one wavelength at a time."""
    divisors = []
    for i in range(0, dims, 2):
        wavelength = 2 * np.pi * theta ** (i / dims)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, "float32")


@pytest.mark.parametrize(("factor", "kind"), [(8.0, "llama3"), (32.0, "llama3"), (1.0, "default")])
def test_llama3_scaling_is_recognized_from_its_divisors(tmp_path, factor, kind):
    config = CONFIG | {"head_dim": 64, "rope_theta": 500000.0}
    tensors = gguf_tensors(random_tensors(config), config)
    tensors["rope_freqs.weight"] = llama3_divisors(500000.0, factor, 64)
    rope = load(write_gguf(tmp_path / "model.gguf", tensors, config))[0].rope
    assert rope.kind == kind
    assert rope.factor == factor
    if kind == "llama3":
        assert (rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings) == (1, 4, 8192)


def test_other_divisors_are_refused(tmp_path):
    tensors = gguf_tensors(random_tensors(CONFIG), CONFIG) | {"rope_freqs.weight": np.array([1, 3], "float32")}
    with pytest.raises(ValueError, match="divisors that are not Llama 3's"):
        load(write_gguf(tmp_path / "model.gguf", tensors))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_from_metadata(tmp_path, kind):
    extra = [("add_rope_scaling_type", gguf.RopeScalingType(kind)), ("add_rope_scaling_factor", 4.0)]
    extra += [("add_rope_scaling_orig_ctx_len", 16)]
    tensors = gguf_tensors(random_tensors(CONFIG), CONFIG)
    rope = load(write_gguf(tmp_path / "model.gguf", tensors, extra=extra))[0].rope
    assert (rope.kind, rope.factor) == (kind, 4.0)
    assert rope.original_max_position_embeddings == (16 if kind == "yarn" else None)


def test_longrope_factors_are_tensors(tmp_path):
    config = CONFIG | {"model_type": "phi3"}
    tensors = gguf_tensors(random_tensors(config), config)
    tensors["rope_factors_long.weight"] = np.array([2.0, 8.0], "float32")
    tensors["rope_factors_short.weight"] = np.array([1.0, 1.5], "float32")
    rope = load(write_gguf(tmp_path / "m.gguf", tensors, config, [("add_rope_scaling_orig_ctx_len", 16)]))[0].rope
    assert (rope.kind, rope.long_factor, rope.short_factor) == ("longrope", (2.0, 8.0), (1.0, 1.5))
    assert rope.original_max_position_embeddings == 16


def test_tokens_that_end_a_turn_end_generation(tmp_path):
    tensors = gguf_tensors(random_tensors(CONFIG), CONFIG)
    config, _ = load(write_gguf(tmp_path / "model.gguf", tensors, extra=[("add_eot_token_id", 9)]))
    assert config.eos_token_ids == (2, 9)


# Quantizations. Blocks of random bytes, with scales that are finite, decoded one value at a time as ggml defines them.
