"""Checkpoints in Hugging Face's layout, with names and shapes spelled out here rather than taken from our table."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# 2 layers, 3 query heads on 1 key-value head of 4 dimensions: no two sizes are equal, so a mixed-up axis cannot hide.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 6,
    "intermediate_size": 5,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def hf_shapes(config):
    """Name → shape of a Llama, Qwen2, Qwen3 or Phi-3 checkpoint."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h = config["head_dim"]
    q, kv = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    family = config["model_type"]
    layer = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.o_proj.weight": (d, q),
        "mlp.down_proj.weight": (d, f),
    }
    if family == "phi3":
        layer |= {"self_attn.qkv_proj.weight": (q + 2 * kv, d), "mlp.gate_up_proj.weight": (2 * f, d)}
    else:
        layer |= {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d)}
        layer |= {f"self_attn.{name}_proj.weight": (rows, d) for name, rows in (("q", q), ("k", kv), ("v", kv))}
    if family == "qwen2":
        layer |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", q), ("k", kv), ("v", kv))}
    if family == "qwen3":
        layer |= {"self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,)}
    shapes = {f"model.layers.{i}.{k}": v for i in range(config["num_hidden_layers"]) for k, v in layer.items()}
    shapes |= {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def random_tensors(config, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype("float32") for name, shape in hf_shapes(config).items()}


def write_hf(directory, tensors, config=CONFIG, file="model.safetensors"):
    """config.json and one safetensors file; returns the directory."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / file)
    return directory


def write_byte_model(directory, special=()):
    """A random model with a token for each of `special`, then one for each byte, and its tokenizer.json."""
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    config = CONFIG | {"vocab_size": len(vocab)}
    write_hf(directory, random_tensors(config), config)
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
