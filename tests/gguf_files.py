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


def gguf_tensors(tensors, config):
    """Hugging Face tensors under GGUF's names, in GGUF's row order."""
    result = {}
    for name, tensor in tensors.items():
        if config["model_type"] == "llama" and "q_proj" in name:
            tensor = interleave(tensor, config["num_attention_heads"])
        if config["model_type"] == "llama" and "k_proj" in name:
            tensor = interleave(tensor, config["num_key_value_heads"])
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        result[name] = tensor
    return result


def write_gguf(path, tensors, config=CONFIG, extra=(), raw_types=None):
    """A GGUF file of a config in Hugging Face's terms; `extra` calls more of the writer's methods."""
    family = config["model_type"]
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
