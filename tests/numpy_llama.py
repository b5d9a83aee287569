"""A Llama in plain NumPy and float64, written from the definition: one sequence, one layer after another, no cache."""

from typing import Any

import numpy as np

from minference_jax.models import LlamaConfig


def random_llama(config: LlamaConfig, patterns: Any = None, dtype: str = "float32", seed: int = 0):
    """A model with `random_params`, for which nothing is compiled; `Llama.random` takes a second or two."""
    import jax.numpy as jnp

    from minference_jax.models.llama import Llama

    params = {name: jnp.asarray(value.astype(dtype)) for name, value in random_params(config, seed).items()}
    return Llama.from_params(config, params, patterns)


def random_params(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 parameters that exercise everything: norms that are not one, biases that are not zero."""
    from minference_jax.models import param_shapes

    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in param_shapes(config).items():
        noise = rng.standard_normal(shape)
        if name.endswith("norm"):
            value = 1 + 0.2 * noise
        elif name[-2:] in ("bq", "bk", "bv"):
            value = 0.5 * noise
        else:
            inputs = shape[1] * shape[2] if name == "layers.wo" else config.hidden_size
            value = noise / np.sqrt(inputs)
        params[name] = value.astype(np.float32)
    return params


def numpy_llama(config: LlamaConfig, params: dict, tokens: np.ndarray, frequencies=None) -> dict:
    """Logits [t, vocab], the residual stream after each layer, and each layer's q, k, v [t, heads, h] after RoPE.

    `frequencies` [r/2] default to those of plain RoPE.
    """
    weights = {name: np.asarray(value, np.float64) for name, value in params.items()}
    t, h, groups = len(tokens), config.head_dim, config.num_heads // config.num_kv_heads
    if frequencies is None:
        frequencies = config.rope.theta ** (-np.arange(0, h, 2) / h)
    angles = np.arange(t)[:, None] * np.asarray(frequencies, np.float64)
    turn = np.exp(1j * angles)[:, None, :]
    causal = np.tril(np.ones((t, t), bool))

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def rotate(x):
        half = turn.shape[-1]
        z = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
        return np.concatenate([z.real, z.imag, x[..., 2 * half :]], -1)

    x = weights["embed"][tokens]
    hidden, qkv = [x], []
    for i in range(config.num_layers):
        layer = {name[7:]: value[i] for name, value in weights.items() if name.startswith("layers.")}
        y = norm(x, layer["attn_norm"])
        q, k, v = (np.einsum("td,dnh->tnh", y, layer[w]) for w in ("wq", "wk", "wv"))
        if config.traits.qkv_bias:
            q, k, v = q + layer["bq"], k + layer["bk"], v + layer["bv"]
        if config.traits.qk_norm:
            q, k = norm(q, layer["q_norm"]), norm(k, layer["k_norm"])
        q, k = rotate(q), rotate(k)
        qkv.append((q, k, v))
        out = np.empty_like(q)
        for head in range(config.num_heads):
            scores = np.where(causal, q[:, head] @ k[:, head // groups].T / np.sqrt(h), -np.inf)
            probabilities = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = probabilities / probabilities.sum(-1, keepdims=True) @ v[:, head // groups]
        x = x + np.einsum("tnh,nhd->td", out, layer["wo"])
        y = norm(x, layer["mlp_norm"])
        gate = y @ layer["w_gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layer["w_up"])) @ layer["w_down"]
        hidden.append(x)
    final = norm(x, weights["final_norm"])
    head = weights["embed"].T if config.tie_embeddings else weights["lm_head"]
    return {"logits": final @ head, "hidden": np.stack([*hidden, final]), "qkv": qkv}


def numpy_greedy(config: LlamaConfig, params: dict, tokens: np.ndarray, steps: int, frequencies=None) -> list[int]:
    """Greedy continuation by a full pass for each token. `frequencies`, if given, is a function of the length."""
    sequence = list(tokens)
    for _ in range(steps):
        turned = None if frequencies is None else frequencies(len(sequence))
        logits = numpy_llama(config, params, np.asarray(sequence), turned)["logits"]
        sequence.append(int(logits[-1].argmax()))
    return sequence[len(tokens) :]
