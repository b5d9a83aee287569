"""GGUF files for tests: Hugging Face tensors under GGUF's names, in its row order and with its metadata."""

import gguf
import numpy as np
from checkpoints import CONFIG

from minference_jax.checkpoints.convert import load_checkpoint

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def interleave(rows, heads):
    """What llama.cpp's converter does to q and k: within each head, the first half's rows between the second's."""
    first, second = np.split(rows.reshape(heads, -1, *rows.shape[1:]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(rows.shape)


_OLMO = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_NAMES_OF = {
    "seed_oss": {"post_attention_layernorm": "post_attention_norm"},
    "gpt_oss": {
        "post_attention_layernorm": "post_attention_norm",
        "self_attn.sinks": "attn_sinks.weight",
        "mlp.router": "ffn_gate_inp",
    },
    "glm4": {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
    "gemma3_text": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "qwen3_moe": {"mlp.gate.": "ffn_gate_inp."},
    "glm4_moe": {
        "post_attention_layernorm": "post_attention_norm",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
        "mlp.gate.": "ffn_gate_inp.",
        **{f"mlp.shared_experts.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
    },
    "olmo2": _OLMO,
    "olmo3": _OLMO,
}
ARCHITECTURES = {
    "ministral3": "mistral3",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
    "olmo3": "olmo2",
    "glm4_moe": "glm4moe",
}
_INTERLEAVED = ("llama", "ministral3", "smollm3", "granite")


def gguf_tensors(tensors, config):
    """Hugging Face tensors under GGUF's names, in GGUF's row order."""
    family, result = config["model_type"], {}
    for name, tensor in tensors.items():
        if family in _INTERLEAVED and "q_proj" in name:
            tensor = interleave(tensor, config["num_attention_heads"])
        if family in _INTERLEAVED and "k_proj" in name:
            tensor = interleave(tensor, config["num_key_value_heads"])
        if family == "gemma3_text" and name.endswith("norm.weight"):
            tensor = tensor + 1
        for theirs, ours in (*_NAMES_OF.get(family, {}).items(), *_NAMES.items()):
            name = name.replace(theirs, ours)
        result |= _experts(name, tensor, result)
    return result


def _experts(name, tensor, before):
    """llama.cpp keeps the experts of a layer in one tensor for each projection."""
    if ".mlp.experts." not in name:
        return {name: tensor}
    layer, rest = name.split(".mlp.experts.")
    if rest.startswith("gate_up_proj"):
        end = "bias" if rest.endswith("bias") else "weight"
        halves = {"gate": tensor[..., ::2], "up": tensor[..., 1::2]}
        return {
            f"{layer}.ffn_{half}_exps.{end}": np.ascontiguousarray(values if end == "bias" else values.swapaxes(1, 2))
            for half, values in halves.items()
        }
    if rest == "down_proj":
        return {f"{layer}.ffn_down_exps.weight": np.ascontiguousarray(tensor.swapaxes(1, 2))}
    if rest == "down_proj_bias":
        return {f"{layer}.ffn_down_exps.bias": tensor}
    expert, projection, _ = rest.split(".")
    name = f"{layer}.ffn_{projection.removesuffix('_proj')}_exps.weight"
    old = [before[name]] if int(expert) else []
    return {name: np.concatenate([*old, tensor[None]])}


def write_gguf(path, tensors, config=CONFIG, extra=(), raw_types=None):
    """A GGUF file of a config in Hugging Face's terms; `extra` calls more of the writer's methods."""
    family = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for method, *arguments in extra:
        getattr(writer, method)(*arguments)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(raw_types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path):
    return load_checkpoint(path, dtype="float32")
