"""Configs of well-known models, so that their real shapes can be run with random weights and without a download."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

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
"""Name → the config that the model's authors publish: Llama-3-8B, Llama-3.1-8B, Qwen2-7B, SmolLM2-135M."""


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
