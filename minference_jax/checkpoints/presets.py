"""Configs of well-known models, so that their real shapes can be run with random weights and without a download."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from minference_jax.models.config import LlamaConfig, RopeConfig, Traits

_LLAMA_3_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope=RopeConfig(theta=500_000.0),
    max_position_embeddings=8192,
    bos_token_id=128_000,
    eos_token_ids=(128_001,),
)

CONFIGS: dict[str, LlamaConfig] = {
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3.1-8b": dataclasses.replace(
        _LLAMA_3_8B,
        rope=RopeConfig(kind="llama3", theta=500_000.0, factor=8.0, original_max_position_embeddings=8192),
        max_position_embeddings=131_072,
        eos_token_ids=(128_001, 128_008, 128_009),
    ),
    "qwen2-7b": LlamaConfig(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        rope=RopeConfig(theta=1_000_000.0),
        rms_norm_eps=1e-6,
        traits=Traits(qkv_bias=True),
        max_position_embeddings=131_072,
        eos_token_ids=(151_643,),
        model_type="qwen2",
    ),
    "smollm2": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope=RopeConfig(theta=100_000.0),
        tie_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_ids=(2,),
    ),
}
"""Name → config of models of the Llama family."""

_PUBLISHED: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32_768,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
    },
    "qwen2.5-7b-1m": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1_010_000,
        "rope_theta": 1e7,
        "dual_chunk_attention_config": {
            "chunk_size": 262_144,
            "local_size": 8192,
            "original_max_position_embeddings": 262_144,
        },
        "eos_token_id": 151_645,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 40_960,
        "rope_theta": 1e6,
        "eos_token_id": 151_645,
    },
    "phi-4": {
        "model_type": "phi3",
        "vocab_size": 100_352,
        "hidden_size": 5120,
        "intermediate_size": 17_920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "max_position_embeddings": 16_384,
        "original_max_position_embeddings": 16_384,
        "rope_theta": 250_000.0,
        "bos_token_id": 100_257,
        "eos_token_id": 100_265,
        "pad_token_id": 100_349,
    },
    "olmo-2-7b": {
        "model_type": "olmo2",
        "vocab_size": 100_352,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500_000.0,
        "eos_token_id": 100_257,
        "pad_token_id": 100_277,
    },
    "olmo-3-7b": {
        "model_type": "olmo3",
        "vocab_size": 100_278,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 65_536,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
        "eos_token_id": 100_257,
        "pad_token_id": 100_277,
    },
    "smollm3-3b": {
        "model_type": "smollm3",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "max_position_embeddings": 65_536,
        "rope_theta": 5e6,
        "eos_token_id": 128_012,
    },
    "seed-oss-36b": {
        "model_type": "seed_oss",
        "vocab_size": 155_136,
        "hidden_size": 5120,
        "intermediate_size": 27_648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "rope_theta": 1e7,
    },
    "ministral-3-8b": {
        "model_type": "ministral3",
        "vocab_size": 131_072,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 34,
        "num_attention_heads": 32,
    },
    "granite-3.3-8b": {
        "model_type": "granite",
        "vocab_size": 49_159,
        "hidden_size": 4096,
        "intermediate_size": 12_800,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e7,
        "tie_word_embeddings": True,
        "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0,
        "logits_scaling": 16.0,
        "residual_multiplier": 0.22,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
    "glm-4-9b": {
        "model_type": "glm4",
        "vocab_size": 151_552,
        "hidden_size": 4096,
        "intermediate_size": 13_696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
    },
    "glm-4.5-air": {
        "model_type": "glm4_moe",
        "vocab_size": 151_552,
        "hidden_size": 4096,
        "intermediate_size": 10_944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "head_dim": 128,
        "attention_bias": True,
        "rope_theta": 1e6,
        "eos_token_id": [151_329, 151_336, 151_338],
    },
    "glm-4.6": {
        "model_type": "glm4_moe",
        "vocab_size": 151_552,
        "hidden_size": 5120,
        "intermediate_size": 12_288,
        "num_hidden_layers": 92,
        "num_attention_heads": 96,
        "head_dim": 128,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 160,
        "moe_intermediate_size": 1536,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "max_position_embeddings": 202_752,
        "rope_theta": 1e6,
        "eos_token_id": [151_329, 151_336, 151_338],
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "head_dim": 128,
        "norm_topk_prob": True,
        "max_position_embeddings": 262_144,
        "rope_theta": 1e7,
        "bos_token_id": 151_643,
        "eos_token_id": [151_645, 151_643],
        "pad_token_id": 151_643,
    },
}
for _name, (_layers, _experts) in {"gpt-oss-20b": (24, 32), "gpt-oss-120b": (36, 128)}.items():
    _PUBLISHED[_name] = {
        "model_type": "gpt_oss",
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": _layers,
        "num_attention_heads": 64,
        "num_local_experts": _experts,
        "eos_token_id": [200_002, 199_999, 200_012],
        "pad_token_id": 199_999,
    }
_GEMMA3 = {  # hidden size, MLP, layers, query and KV heads, head_dim, window, context
    "gemma-3-270m": (640, 2048, 18, 4, 1, 256, 512, 32_768),
    "gemma-3-1b": (1152, 6912, 26, 4, 1, 256, 512, 32_768),
    "gemma-3-4b": (2560, 10_240, 34, 8, 4, 256, 1024, 131_072),
    "gemma-3-12b": (3840, 15_360, 48, 16, 8, 256, 1024, 131_072),
    "gemma-3-27b": (5376, 21_504, 62, 32, 16, 128, 1024, 131_072),
}
for _name, (_d, _f, _layers, _n, _k, _h, _window, _context) in _GEMMA3.items():
    _PUBLISHED[_name] = {
        "model_type": "gemma3_text",
        "vocab_size": 262_144 if _context == 32_768 else 262_208,
        "hidden_size": _d,
        "intermediate_size": _f,
        "num_hidden_layers": _layers,
        "num_attention_heads": _n,
        "num_key_value_heads": _k,
        "head_dim": _h,
        "query_pre_attn_scalar": 168 if _h == 128 else 256,
        "sliding_window": _window,
        "max_position_embeddings": _context,
        "rope_scaling": None if _context == 32_768 else {"rope_type": "linear", "factor": 8.0},
        "eos_token_id": [1, 106],
    }

CONFIGS |= {name: LlamaConfig.from_hf(config) for name, config in _PUBLISHED.items()}
"""Name → the config that the model's authors publish."""


def known_config(name: str | os.PathLike) -> LlamaConfig:
    """The config of that name in `CONFIGS`, or of that `config.json` (or a directory with one).

    Raises `ValueError` for a name that is neither, and what `LlamaConfig.from_hf` raises for a file.
    """
    name = os.fspath(name)
    if name in CONFIGS:
        return CONFIGS[name]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(f"{name!r} is neither a config.json nor one of {', '.join(CONFIGS)}")
    return LlamaConfig.from_hf(json.loads(path.read_bytes()))
