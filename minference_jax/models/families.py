"""The model families: what a `config.json` of each means. One row a family, one field a difference.

Sources: the configuration and modeling files of transformers 5.23.
"""

from __future__ import annotations

from minference_jax.models.traits import Experts, Family, Number, Traits

_BOTH, _MLP = {"attention_bias": ("qkv_bias", "o_bias")}, {"mlp_bias": ("mlp_bias",)}
_BOS_EOS = {"bos_token_id": 1, "eos_token_id": 2}
_KV_HEADS = ("num_key_value_heads",)
_QWEN = {
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
}
_OLMO = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1}
_OLMO_TRAITS = Traits(wide_qk_norm=True, pre_norms=False, post_norms=True, norm_offset=0.0)

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048, **_BOS_EOS}, biases=_BOTH | _MLP),
    "mistral": Family(
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8, **_BOS_EOS},
        window="all",
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        {
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "pad_token_id": 11,
            **_BOS_EOS,
        },
        numbers={"query_growth": Number("llama_4_scaling_beta", in_rope=True)},
        window="all",
        rope={
            "type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", _QWEN, _KV_HEADS, Traits(qkv_bias=True), window="from", switch=True, dual_chunk=True
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_QWEN, "head_dim": 128},
        _KV_HEADS,
        Traits(qk_norm=True),
        biases=_BOTH,
        window="from",
        switch=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        traits=Traits(qk_norm=True),
        biases=_BOTH,
        experts={
            "number": "num_experts",
            "chosen": "num_experts_per_tok",
            "width": "moe_intermediate_size",
            "normalized": "norm_topk_prob",
        },
        window="all",
        switch=True,
        only={"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        window="all",
        partial_rotary=True,
        rope_kinds=("default", "longrope"),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
        },
        _KV_HEADS,
        biases=_BOTH | _MLP,
        window="no_rope",
        switch=True,
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        {
            "max_position_embeddings": 524288,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        (*_KV_HEADS, "head_dim"),
        biases={"attention_bias": ("qkv_bias",), "attention_out_bias": ("o_bias",)} | _MLP,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {
            "max_position_embeddings": 2048,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "attention_multiplier": 1.0,
            **_BOS_EOS,
        },
        biases=_BOTH | _MLP,
        numbers={
            "embed_scale": Number("embedding_multiplier"),
            "residual_scale": Number("residual_multiplier"),
            "logit_divisor": Number("logits_scaling"),
            "attention_scale": Number("attention_multiplier"),
        },
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1.5625e-7,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
            "eos_token_id": [151329, 151336, 151338],
            "pad_token_id": 151329,
        },
        traits=Traits(post_norms=True, neighbours=True),
        biases={"attention_bias": ("qkv_bias",)},
        partial_rotary=True,
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
        traits=Traits(experts=Experts(scoring="sigmoid")),
        biases={"attention_bias": ("qkv_bias",), "use_qk_norm": ("qk_norm",)},
        experts={
            "number": "n_routed_experts",
            "chosen": "num_experts_per_tok",
            "width": "moe_intermediate_size",
            "normalized": "norm_topk_prob",
            "groups": "n_group",
            "top_groups": "topk_group",
            "scale": "routed_scaling_factor",
            "shared": "n_shared_experts",
            "first": "first_k_dense_replace",
        },
        partial_rotary=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10_000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        traits=Traits(qk_norm=True, post_norms=True, norm_offset=1.0, activation="gelu_tanh"),
        biases=_BOTH,
        numbers={
            "embed_scale": Number("hidden_size", 0.5),
            "attention_scale": Number("query_pre_attn_scalar", -0.5),
            "logit_cap": Number("final_logit_softcapping"),
        },
        window="types",
        pattern="sliding_window_pattern",
        local_rope="rope_local_base_freq",
        only={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    ),
    "olmo2": Family("Olmo2ForCausalLM", {**_OLMO, "rope_theta": 10_000.0}, traits=_OLMO_TRAITS, biases=_BOTH),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {**_OLMO, "rope_theta": 500_000.0, "sliding_window": 4096},
        traits=_OLMO_TRAITS,
        biases=_BOTH,
        window="types",
        pattern=4,
        local_rope="rope_parameters",
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "rope_theta": 150_000.0,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "attention_bias": True,
        },
        traits=Traits(
            norm_offset=0.0,
            activation="clamped_swiglu",
            sinks=True,
            experts=Experts(normalized=True, bias=True),
        ),
        biases=_BOTH,
        experts={"number": "num_local_experts", "chosen": "num_experts_per_tok", "width": "intermediate_size"},
        window="types",
        pattern=2,
        rope={"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
        only={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        quantized=("mxfp4",),
    ),
}
"""model_type → family, in the order that messages list them."""

WRAPPERS: dict[str, str] = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""Models of pictures and text whose text part is a model of its own → its model_type, where the file names none."""
