"""The model families: what a `config.json` of each means. One row a family, one field a difference.

Sources: the configuration and modeling files of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP.

    - `number`, `chosen`: experts, and how many serve a token. `width`: of one expert.
    - `normalized`: the chosen experts' weights are divided by their sum.
    - `bias`: router and experts have biases (gpt-oss), and the chosen experts' weights are their own softmax.
    """

    number: int
    chosen: int
    width: int
    normalized: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Traits:
    """What a model does differently from Llama. Each field is one switch, and Llama's value its default.

    - `qkv_bias`, `o_bias`, `mlp_bias`: biases of the projections. `qk_norm`: RMSNorm on the heads of q and k.
    - `post_norms`: RMSNorm on the output of attention and of the MLP, before each is added.
    - `norm_offset`: norms multiply by this plus their weight, in float32 (Gemma: 1).
    - `activation`: of the MLP's gate. `neighbours`: RoPE turns neighbouring dimensions (GLM-4), not the two halves.
    - `embed_scale`, `residual_scale`, `logit_divisor`: of the embeddings, of what a layer adds, of the logits.
    - `attention_scale`: of the scores; None for 1/√head_dim. `logit_cap`: c in c·tanh(logits/c); None for no cap.
    - `query_growth`: queries at position p are multiplied by 1 + this · log(1 + ⌊p / trained length⌋) (Ministral 3).
    - `sinks`: each head has a score without a key, which takes its share of the softmax (gpt-oss).
    - `experts`: None for one MLP.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    activation: Activation = "silu"
    neighbours: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    attention_scale: float | None = None
    logit_cap: float | None = None
    query_growth: float = 0.0
    sinks: bool = False
    experts: Experts | None = None


@dataclass(frozen=True)
class Family:
    """How a family's config.json is read.

    - `architecture`: the class that transformers names. `defaults`: of keys that a config.json leaves out.
    - `traits`: those that every model of the family has.
    - `attention_bias`, `mlp_bias`: traits that the key of that name sets; none where the family ignores the key.
    - `numbers`: trait → the key that holds it.
    - `window`: which layers `sliding_window` is for: "none"; "all"; "switch": those from `max_window_layers` on, if
      `use_sliding_window` says so; "types": those that `layer_types` calls sliding.
    - `pattern`: with "types" and no `layer_types`, every so manieth layer is not sliding.
    - `partial_rotary`: whether a part of each head may be rotated.
    """

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    traits: Traits = Traits()
    attention_bias: tuple[str, ...] = ()
    mlp_bias: tuple[str, ...] = ()
    numbers: Mapping[str, str] = field(default_factory=dict)
    window: Literal["none", "all", "switch", "types"] = "none"
    pattern: int = 0
    partial_rotary: bool = False


_BOTH = ("qkv_bias", "o_bias")
_QWEN = {
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        attention_bias=_BOTH,
        mlp_bias=("mlp_bias",),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {
            "max_position_embeddings": 131072,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "sliding_window": 4096,
            "num_key_value_heads": 8,
        },
        window="all",
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, Traits(qkv_bias=True), window="switch"),
    "qwen3": Family(
        "Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, Traits(qk_norm=True), attention_bias=_BOTH, window="switch"
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
    ),
}
"""model_type → family, in the order that messages list them."""
