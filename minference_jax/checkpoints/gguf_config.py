"""GGUF metadata → the dictionary of a Hugging Face `config.json`, which `LlamaConfig.from_hf` reads."""

from __future__ import annotations

from typing import Any

import numpy as np

from minference_jax.checkpoints.gguf_file import GGUFFile
from minference_jax.checkpoints.gguf_split import SplitGGUF
from minference_jax.models.families import FAMILIES

# llama.cpp's architecture → model_type. GGUF keeps Mistral under "llama".
ARCHITECTURES = {
    "llama": "llama",
    "mistral3": "ministral3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "seed_oss": "seed_oss",
    "granite": "granite",
    "glm4": "glm4",
    "glm4moe": "glm4_moe",
    "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
    "olmo2": "olmo3",
}
# What some architectures' files say beside the common keys: key → config.json's.
_NUMBERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA3_27B_LAYERS = 62  # the one size whose scores llama.cpp scales by other than 1/√head_dim, by this number

# Llama 3 files give no parameters of their RoPE scaling, only the resulting divisors. Every released Llama 3.x shares
# these three; the factor is the largest divisor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


# Many chat models' files name only the end of the text as eos. llama.cpp finds the other ends by their text
# (`special_eog_ids` in llama-vocab.cpp), the ends of an infilled file with them.
_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<end_of_turn>", "<turn|>", "<|tool_response>", "<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>"),
        *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<｜end▁of▁sentence｜>", "<end_of_utterance>"),
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>"),
        *("<REPO>", "<reponame>", "<|file_sep|>"),
    )
)
# Where all of these are there too, the token ends no turn (the formats of gpt-oss, and of Gemma 4).
_NOT_WITH = {"<|end|>": {"<|return|>", "<|call|>"}, "</s>": {"<|tool_response>"}}


def hf_config(file: GGUFFile | SplitGGUF) -> dict[str, Any]:
    """The config of a GGUF model in Hugging Face's terms.

    Raises `ValueError` naming the file: for an architecture other than `ARCHITECTURES`, sizes that vary by layer, or a
    RoPE scaling that cannot be expressed.
    """
    try:
        return _hf_config(file)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _hf_config(file: GGUFFile | SplitGGUF) -> dict[str, Any]:
    metadata = file.metadata
    family = metadata.get("general.architecture")
    if family not in ARCHITECTURES:
        raise ValueError(f"GGUF architecture {family!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    name = ARCHITECTURES[family]
    if name == "olmo3" and f"{family}.attention.sliding_window" not in metadata:
        name = "olmo2"
    takes_experts = FAMILIES[name].experts is not None
    if metadata.get(f"{family}.expert_count", 0) and not takes_experts:
        raise ValueError(f"mixtures of experts of architecture {family!r} are not supported")

    def get(key: str, otherwise: Any = None) -> Any:
        value = metadata.get(f"{family}.{key}", otherwise)
        if isinstance(value, np.ndarray):
            raise ValueError(f"{family}.{key} differs by layer, which is not supported")
        return value

    names = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    missing = [f"{family}.{key}" for key in names.values() if get(key) is None]
    missing += [name for name in ("token_embd.weight",) if name not in file.tensors]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}")

    config = {name: get(key) for name, key in names.items()}
    heads = config["num_attention_heads"]
    head_dim = get("attention.key_length", config["hidden_size"] // max(heads, 1))
    if get("attention.value_length", head_dim) != head_dim:
        raise ValueError(
            f"keys of {head_dim} dimensions and values of {get('attention.value_length')} are not supported"
        )
    config |= {
        "model_type": name,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(config["rms_norm_eps"]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": _shortest(get("rope.freq_base", 10_000.0)),
        "partial_rotary_factor": get("rope.dimension_count", head_dim) / head_dim,
        "sliding_window": get("attention.sliding_window") or None,  # 0: no window
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_token_ids(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    config |= _biases(file) | _by_family(name, config, get)
    slides = metadata.get(f"{family}.attention.sliding_window_pattern")
    if FAMILIES[name].window == "types" and isinstance(slides, np.ndarray | list):
        config["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    config["rope_scaling"] = _rope_scaling(file, config, get)
    if config["rope_scaling"] and "original_max_position_embeddings" in config["rope_scaling"]:
        config["original_max_position_embeddings"] = config["rope_scaling"]["original_max_position_embeddings"]
    return config


def _biases(file: GGUFFile | SplitGGUF) -> dict[str, bool]:
    """The switches of biases, by the tensors of the first layer."""
    tensors = {"attention_bias": "attn_q", "attention_out_bias": "attn_output", "mlp_bias": "ffn_up"}
    found = {key: f"blk.0.{tensor}.bias" in file.tensors for key, tensor in tensors.items()}
    return found | {"use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors}


def _by_family(name: str, config: dict[str, Any], get: Any) -> dict[str, Any]:
    """What only some architectures' files say, or leave to llama.cpp."""
    found = {key: _shortest(get(theirs)) for theirs, key in _NUMBERS.items() if get(theirs) is not None}
    if FAMILIES[name].experts is not None:
        counts = {"number": get("expert_count"), "chosen": get("expert_used_count")}
        counts["width"] = get("expert_feed_forward_length", config["intermediate_size"])
        found |= {key: counts[field] for field, key in (FAMILIES[name].experts or {}).items() if field in counts}
        found["norm_topk_prob"] = get("expert_weights_norm", True)
    if name == "glm4_moe":
        found |= {"n_shared_experts": get("expert_shared_count", 0)}
        found |= {"first_k_dense_replace": get("leading_dense_block_count", 0)}
        found |= {"routed_scaling_factor": _shortest(get("expert_weights_scale", 1.0))}
        found |= {"num_hidden_layers": config["num_hidden_layers"] - get("nextn_predict_layers", 0)}
    if name == "gemma3_text":
        whole = config["num_hidden_layers"] == _GEMMA3_27B_LAYERS
        scalar = config["hidden_size"] // config["num_attention_heads"] if whole else config["head_dim"]
        found |= {"query_pre_attn_scalar": scalar, "rope_local_base_freq": _shortest(get("rope.freq_base_swa", 1e4))}
    return found


def eos_token_ids(metadata: dict[str, Any]) -> list[int]:
    """Every token at which generation ends: those that keys name, then those that llama.cpp knows by their text."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    named = [metadata[key] for key in keys if key in metadata]
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    found = {token: i for i, token in enumerate(tokens) if ends_generation(token)}
    for ends, kept in _NOT_WITH.items():
        if kept <= found.keys():
            found.pop(ends, None)
    return list(dict.fromkeys([*named, *found.values()]))


def ends_generation(token: str) -> bool:
    """Whether a token of this text ends a turn, a message or the text."""
    return token in _ENDS


def _shortest(value: float) -> float:
    """A float32 of the file as the decimal it was written from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GGUFFile | SplitGGUF, config: dict[str, Any], get: Any) -> dict[str, Any] | None:
    kind = get("rope.scaling.type")
    original = get("rope.scaling.original_context_length")
    scaling: dict[str, Any] | None
    if "rope_factors_long.weight" in file.tensors:
        scaling = {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            "attention_factor": get("rope.scaling.attn_factor"),
            "long_factor": file.read("rope_factors_long.weight").tolist(),
            "short_factor": file.read("rope_factors_short.weight").tolist(),
        }
    elif "rope_freqs.weight" in file.tensors:
        scaling = _llama3_scaling(file.read("rope_freqs.weight"), config["rope_theta"])
    elif kind in (None, "none"):
        factor = get("rope.scale_linear", 1.0)  # the key of files written before rope.scaling.type existed
        scaling = {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    elif kind in ("linear", "yarn"):
        scaling = {
            "rope_type": kind,
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": original if kind == "yarn" else None,
        }
        if kind == "yarn":
            scaling |= _yarn(config["model_type"], get)
    else:
        raise ValueError(f"RoPE scaling {kind!r} is not supported")
    return {key: value for key, value in scaling.items() if value is not None} if scaling else None


def _yarn(name: str, get: Any) -> dict[str, Any]:
    """The finer settings of YaRN. The files of some architectures leave them to llama.cpp."""
    found = {
        "beta_fast": get("rope.scaling.yarn_beta_fast"),
        "beta_slow": get("rope.scaling.yarn_beta_slow"),
        "mscale_all_dim": get("rope.scaling.yarn_log_multiplier") or None,
    }
    if found["mscale_all_dim"]:
        found["mscale"] = 1.0
    if name == "ministral3":
        found["llama_4_scaling_beta"] = _shortest(get("attention.temperature_scale", 0.0))
    if name == "gpt_oss":
        found["truncate"] = False
    return found


def _llama3_scaling(divisors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """Recognizes the divisors of "llama3" RoPE scaling (Llama 3.1's config and its definition in transformers)."""
    divisors = np.asarray(divisors, np.float64).reshape(-1)
    factor = float(divisors.max())
    if np.all(divisors == 1.0):
        return None
    low, high, original = _LLAMA3.values()
    turns = original / (2 * np.pi) * theta ** -(np.arange(len(divisors)) / len(divisors))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise ValueError("rope_freqs.weight holds divisors that are not Llama 3's; this RoPE scaling is not supported")
    return {"rope_type": "llama3", "factor": factor} | _LLAMA3
