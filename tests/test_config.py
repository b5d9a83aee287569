"""LlamaConfig: reading and writing config.json of five families, and refusing what the model cannot do."""

import dataclasses

import pytest
from variants import VARIANTS

from minference_jax.models import LlamaConfig, RopeConfig, param_shapes

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def test_llama_3_1_config_is_read():
    config = LlamaConfig.from_hf(
        LLAMA
        | {
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "eos_token_id": [128001, 128008, 128009],
            "torch_dtype": "bfloat16",
        }
    )
    assert config == LlamaConfig(
        *(100, 32, 64, 3, 4, 2, 8),
        rope=RopeConfig(kind="llama3", theta=500000.0, factor=8.0, original_max_position_embeddings=8192),
        max_position_embeddings=131072,
        bos_token_id=1,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_left_out_keys_mean_the_family_defaults():
    config = LlamaConfig.from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.eos_token_ids) == (4, 8, (2,))
    assert (config.rms_norm_eps, config.tie_embeddings, config.rope) == (1e-6, False, RopeConfig())
    qwen3 = LlamaConfig.from_hf(LLAMA | {"model_type": "qwen3"})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias, qwen3.eos_token_ids) == (128, True, False, ())
    assert LlamaConfig.from_hf(LLAMA | {"model_type": "qwen2"}).qkv_bias


def test_transformers_4_and_5_layouts_are_the_same():
    old = LLAMA | {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}}
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new)
    assert LlamaConfig.from_hf(old).rope == RopeConfig(kind="linear", theta=5e4, factor=2.0)


def test_phi3_longrope_derives_its_factor_from_the_two_lengths():
    config = LlamaConfig.from_hf(
        LLAMA
        | {
            "model_type": "phi3",
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "sliding_window": 262144,
            "rope_scaling": {"type": "su", "short_factor": [1, 1.1, 1.2, 1.3], "long_factor": [2, 3, 4, 5]},
        }
    )
    assert (config.rope.kind, config.rope.factor) == ("longrope", 32.0)
    assert config.rope.short_factor == (1.0, 1.1, 1.2, 1.3)
    assert set(config.to_hf()["rope_scaling"]) == {"type", "short_factor", "long_factor"}


@pytest.mark.parametrize("name", VARIANTS)
def test_written_configs_read_back(name):
    config = LlamaConfig.from_hf(VARIANTS[name])
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert hash(config) == hash(LlamaConfig.from_hf(config.to_hf()))


def test_everything_unsupported_is_reported_at_once():
    bad = {
        "model_type": "mistral",
        "vocab_size": 9,
        "hidden_act": "gelu",
        "sliding_window": 4096,
        "attention_bias": True,
        "quantization_config": {"bits": 4},
        "rope_scaling": {"rope_type": "fancy"},
    }
    with pytest.raises(ValueError) as error:
        LlamaConfig.from_hf(bad)
    for part in ("hidden_size is missing", "gelu", "sliding_window 4096", "attention_bias", "quantization", "'fancy'"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 5}, "must be even"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "phi3 only"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor must hold 4 numbers",
        ),
    ],
)
def test_unusable_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(LLAMA | change)


def test_sliding_window_is_accepted_only_where_it_cannot_act():
    mistral = LLAMA | {"model_type": "mistral", "max_position_embeddings": 1000}
    LlamaConfig.from_hf(mistral | {"sliding_window": 1000})
    LlamaConfig.from_hf(mistral | {"sliding_window": None})
    with pytest.raises(ValueError, match="sliding_window 999"):
        LlamaConfig.from_hf(mistral | {"sliding_window": 999})
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 16}
    LlamaConfig.from_hf(qwen | {"use_sliding_window": False})
    with pytest.raises(ValueError, match="sliding_window 16"):
        LlamaConfig.from_hf(qwen | {"use_sliding_window": True})


def test_a_family_cannot_be_written_with_another_familys_switches():
    config = dataclasses.replace(LlamaConfig.from_hf(LLAMA), qkv_bias=True)
    with pytest.raises(ValueError, match="cannot express qkv_bias=True"):
        config.to_hf()


def test_parameter_shapes():
    config = LlamaConfig(7, 6, 10, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, qk_norm=True)
    assert param_shapes(config) == {
        "embed": (7, 6),
        "layers.attn_norm": (3, 6),
        "layers.mlp_norm": (3, 6),
        "layers.wq": (3, 6, 4, 8),
        "layers.wk": (3, 6, 2, 8),
        "layers.wv": (3, 6, 2, 8),
        "layers.wo": (3, 4, 8, 6),
        "layers.w_gate": (3, 6, 10),
        "layers.w_up": (3, 6, 10),
        "layers.w_down": (3, 10, 6),
        "layers.bq": (3, 4, 8),
        "layers.bk": (3, 2, 8),
        "layers.bv": (3, 2, 8),
        "layers.q_norm": (3, 8),
        "layers.k_norm": (3, 8),
        "final_norm": (6,),
        "lm_head": (6, 7),
    }
    assert "lm_head" not in param_shapes(dataclasses.replace(config, tie_embeddings=True))
