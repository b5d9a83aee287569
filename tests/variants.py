"""Small Hugging Face configs, one for each thing that a config of a supported family can switch.

They have `model_type` and only the fields a published config.json of that family has. Sequences of up to 150 tokens
run through them: more than one 128-row query tile, and past the 64 or 128 positions where the RoPE variants that
depend on length change over.
"""

from typing import Any

_SMALL = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama(**changes: Any) -> dict[str, Any]:
    return _SMALL | {"model_type": "llama"} | changes


def _rope(kind: str, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": kind, **scaling}


# Every head_dim 8 model rotates 4 pairs: LongRoPE wants one factor for each.
_LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.2, 2.0, 5.0, 9.0]}

FAMILIES: dict[str, dict[str, Any]] = {
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "tie_word_embeddings": True},
    "smollm3_window": {
        "model_type": "smollm3",
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 40,
        "no_rope_layers": [1, 0],
    },
    "seed_oss": {"model_type": "seed_oss", "head_dim": 16, "attention_out_bias": True},
    "ministral3": {
        "model_type": "ministral3",
        "head_dim": 16,
        "rope_scaling": _rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=64,
            mscale=1.0,
            mscale_all_dim=1.0,
            llama_4_scaling_beta=0.3,
        ),
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 1.7,
        "attention_multiplier": 0.2,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": 37,
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
        "rope_scaling": _rope("linear", factor=8.0),
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 9.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 40,
        "attention_bias": True,
        "rope_scaling": _rope(
            "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0, truncate=False
        ),
    },
    "olmo2": {"model_type": "olmo2", "head_dim": 16},
    "olmo3": {
        "model_type": "olmo3",
        "num_hidden_layers": 4,
        "sliding_window": 40,
        "rope_theta": 5e5,
        "rope_scaling": _rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.2),
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.7,
        "first_k_dense_replace": 1,
    },
    "glm4": {"model_type": "glm4", "head_dim": 16, "partial_rotary_factor": 0.5, "attention_bias": True},
}
"""Of the other families: what differs from `_SMALL`."""

VARIANTS: dict[str, dict[str, Any]] = {
    # Query heads for each KV head.
    "gqa1": _llama(num_key_value_heads=8),
    "gqa4": _llama(),
    "gqa8": _llama(num_key_value_heads=1),
    # Sizes and switches.
    "tied": _llama(tie_word_embeddings=True),
    "odd_sizes": _llama(
        num_attention_heads=6, hidden_size=84, head_dim=12, vocab_size=333, rms_norm_eps=0.3, rope_theta=1e6
    ),
    # Every RoPE scaling. Those that depend on the length see rows within and past the original context.
    "rope_linear": _llama(rope_scaling=_rope("linear", factor=4.0)),
    "rope_dynamic": _llama(rope_scaling=_rope("dynamic", factor=3.0), max_position_embeddings=64),
    "rope_llama3": _llama(
        rope_scaling=_rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        )
    ),
    "rope_yarn": _llama(rope_scaling=_rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "rope_yarn_tuned": _llama(
        head_dim=16,
        rope_scaling=_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=128,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=0.8,
            mscale_all_dim=1.2,
            truncate=False,
        ),
    ),
    "rope_yarn_attention_factor": _llama(
        rope_scaling=_rope("yarn", factor=4.0, original_max_position_embeddings=128, attention_factor=0.9)
    ),
    "rope_longrope": _llama(
        rope_scaling=_rope("longrope", factor=4.0, original_max_position_embeddings=64, **_LONGROPE)
    ),
    "biases": _llama(attention_bias=True, mlp_bias=True),
    # The other families.
    "mistral": _SMALL | {"model_type": "mistral", "sliding_window": 512, "head_dim": 16},
    "mistral_window": _SMALL | {"model_type": "mistral", "sliding_window": 37},
    "qwen3_window_bias": _SMALL
    | {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 1,
    },
    "qwen2": _SMALL
    | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 2},
    "qwen3": _SMALL | {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 4},
    "qwen3_tied_yarn": _SMALL
    | {
        "model_type": "qwen3",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_scaling": _rope("yarn", factor=4.0, original_max_position_embeddings=64),
    },
    "phi3_longrope": _SMALL
    | {
        "model_type": "phi3",
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", **_LONGROPE},
    },
    "phi3_partial_rotary": _SMALL
    | {
        "model_type": "phi3",
        "head_dim": 16,
        "original_max_position_embeddings": 512,
        "partial_rotary_factor": 0.5,
        "sliding_window": 2047,
    },
    **{name: _SMALL | config for name, config in FAMILIES.items()},
}
