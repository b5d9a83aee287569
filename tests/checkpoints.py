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
    """Name → shape of a checkpoint of any supported family."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h = config["head_dim"]
    q, kv = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    family = config["model_type"]
    layer = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.o_proj.weight": (d, q),
    }
    heads = (("q", q), ("k", kv), ("v", kv))
    if family == "phi3":
        layer |= {"self_attn.qkv_proj.weight": (q + 2 * kv, d)}
    else:
        layer |= {f"self_attn.{name}_proj.weight": (rows, d) for name, rows in heads}
    if family == "qwen2" or config.get("attention_bias"):
        layer |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in heads}
    if family in ("llama", "qwen3", "smollm3", "granite", "gpt_oss") and config.get("attention_bias"):
        layer |= {"self_attn.o_proj.bias": (d,)}
    if config.get("attention_out_bias"):
        layer |= {"self_attn.o_proj.bias": (d,)}
    if family in ("qwen3", "qwen3_moe", "gemma3_text") or config.get("use_qk_norm"):
        layer |= {"self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,)}
    if family == "glm4":
        layer |= {"post_self_attn_layernorm.weight": (d,), "post_mlp_layernorm.weight": (d,)}
    if family == "gemma3_text":
        layer |= {"pre_feedforward_layernorm.weight": (d,), "post_feedforward_layernorm.weight": (d,)}
    if family in ("olmo2", "olmo3"):
        del layer["input_layernorm.weight"]
        layer |= {"self_attn.q_norm.weight": (q,), "self_attn.k_norm.weight": (kv,)}
        layer |= {"post_feedforward_layernorm.weight": (d,)}
    layers = [layer | _mlp_shapes(config, family, d, f)] * config["num_hidden_layers"]
    if family == "glm4_moe":
        layers[0] = layer | _mlp_shapes(config, "llama", d, f)
    shapes = {f"model.layers.{i}.{k}": v for i, layer in enumerate(layers) for k, v in layer.items()}
    shapes |= {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def _mlp_shapes(config, family, d, f):
    if family == "gpt_oss":
        e = config["num_local_experts"]
        return {
            "self_attn.sinks": (config["num_attention_heads"],),
            "mlp.router.weight": (e, d),
            "mlp.router.bias": (e,),
            "mlp.experts.gate_up_proj": (e, d, 2 * f),
            "mlp.experts.gate_up_proj_bias": (e, 2 * f),
            "mlp.experts.down_proj": (e, f, d),
            "mlp.experts.down_proj_bias": (e, d),
        }
    if family in ("qwen3_moe", "glm4_moe"):
        e = config["num_experts" if family == "qwen3_moe" else "n_routed_experts"]
        w = config["moe_intermediate_size"]
        projections = {"gate_proj": (w, d), "up_proj": (w, d), "down_proj": (d, w)}
        shapes = {f"mlp.experts.{i}.{name}.weight": shape for i in range(e) for name, shape in projections.items()}
        shapes = {"mlp.gate.weight": (e, d)} | shapes
        if family == "glm4_moe":
            shapes |= {"mlp.gate.e_score_correction_bias": (e,)}
            shapes |= {f"mlp.shared_experts.{name}.weight": shape for name, shape in projections.items()}
        return shapes
    if family in ("phi3", "glm4"):
        return {"mlp.gate_up_proj.weight": (2 * f, d), "mlp.down_proj.weight": (d, f)}
    projections = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    shapes = {f"mlp.{name}.weight": shape for name, shape in projections.items()}
    if config.get("mlp_bias"):
        shapes |= {f"mlp.{name}.bias": shape[:1] for name, shape in projections.items()}
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
