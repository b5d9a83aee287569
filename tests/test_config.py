"""LlamaConfig: reading and writing config.json of five families, and refusing what the model cannot do."""

import dataclasses

import pytest
from variants import VARIANTS

from minference_jax.models import LlamaConfig, RopeConfig, param_shapes
from minference_jax.models.config import LayerKind, Traits

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
    qwen3 = LlamaConfig.from_hf(LLAMA | {"model_type": "qwen3", "num_key_value_heads": None})
    assert (qwen3.head_dim, qwen3.num_kv_heads, qwen3.traits, qwen3.eos_token_ids) == (128, 4, Traits(qk_norm=True), ())
    with pytest.raises(ValueError, match="num_kv_heads=32"):  # transformers' default where the key is missing
        LlamaConfig.from_hf(LLAMA | {"model_type": "qwen2"})


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
        "attention_bias": True,
        "quantization_config": {"bits": 4},
        "rope_scaling": {"rope_type": "fancy"},
    }
    with pytest.raises(ValueError) as error:
        LlamaConfig.from_hf(bad)
    for part in ("hidden_size is missing", "num_attention_heads is missing"):
        assert part in str(error.value)
    with pytest.raises(ValueError) as error:
        LlamaConfig.from_hf(LLAMA | {key: bad[key] for key in ("hidden_act", "quantization_config")})
    for part in ("gelu", "quantiz"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="'fancy'"):
        LlamaConfig.from_hf(LLAMA | {"rope_scaling": bad["rope_scaling"]})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 5}, "must be even"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor must hold 4 numbers",
        ),
    ],
)
def test_unusable_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(LLAMA | change)


def test_windows_are_of_the_layers_that_transformers_gives_them():
    mistral = LLAMA | {"model_type": "mistral", "max_position_embeddings": 1000, "num_key_value_heads": 4}
    assert LlamaConfig.from_hf(mistral | {"sliding_window": None}).layer_kinds == ()
    config = LlamaConfig.from_hf(mistral | {"sliding_window": 999})
    assert (config.sliding_window, config.layer_kinds) == (999, (LayerKind(window=True),) * 3)
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 16, "num_key_value_heads": 4}
    assert not LlamaConfig.from_hf(qwen | {"use_sliding_window": False}).windowed
    assert not LlamaConfig.from_hf(qwen | {"use_sliding_window": True}).windowed  # from layer 28 on
    config = LlamaConfig.from_hf(qwen | {"use_sliding_window": True, "max_window_layers": 2})
    assert [kind.window for kind in config.layer_kinds] == [False, False, True]
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert LlamaConfig.from_hf(LLAMA | {"sliding_window": 4}).layer_kinds == ()  # the family knows no windows


def test_rope_scaling_counts_where_rope_parameters_are_there_too():
    both = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    }
    rope = LlamaConfig.from_hf(LLAMA | both).rope
    assert (rope.kind, rope.factor, rope.theta) == ("yarn", 4.0, 10_000.0)  # as transformers: theta goes with the other


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "32"},
        {"hidden_size": True},
        {"num_attention_heads": 0},
        {"num_key_value_heads": -1},
        {"rms_norm_eps": "tiny"},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": float("inf")},
        {"rope_theta": [1e4]},
        {"tie_word_embeddings": "no"},
        {"eos_token_id": "</s>"},
        {"eos_token_id": [2, None]},
        {"max_position_embeddings": 2.5},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"rope_type": "linear", "factor": "4"}},
        {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}},
        {"rope_scaling": {"rope_type": ["linear"]}},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": 1.0, "long_factor": [1.0]}},
        {"model_type": ["llama"]},
    ],
)
def test_values_of_the_wrong_type_or_range_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change)).replace("rope_scaling", "rope")):
        LlamaConfig.from_hf(LLAMA | change)


def test_keys_that_a_family_ignores_do_not_matter():
    for family in ("mistral", "qwen2", "phi3"):
        config = LLAMA | {"model_type": family, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}
        traits = LlamaConfig.from_hf(config).traits
        assert (traits.o_bias, traits.mlp_bias, traits.qkv_bias) == (False, False, family == "qwen2")
    traits = LlamaConfig.from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True}).traits
    assert traits == Traits(qkv_bias=True, o_bias=True, mlp_bias=True)
    assert LlamaConfig.from_hf(LLAMA | {"pad_token_id": -1}).pad_token_id is None  # Llama 2 wrote it so


def test_a_family_cannot_be_written_with_another_familys_switches():
    config = dataclasses.replace(LlamaConfig.from_hf(LLAMA), traits=Traits(qk_norm=True))
    with pytest.raises(ValueError, match=r"'llama' cannot express .*qk_norm=True"):
        config.to_hf()


def test_parameter_shapes():
    config = LlamaConfig(
        7, 6, 10, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, traits=Traits(qkv_bias=True, qk_norm=True)
    )
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
