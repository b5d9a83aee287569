"""The names and shapes of a model's parameters, known without allocating any."""

from __future__ import annotations

from minference_jax.models.config import LlamaConfig


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's parameters. Heads stay an axis of the projections, so attention needs no reshape."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    n, k = config.num_heads, config.num_kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "wq": (d, n, h),
        "wk": (d, k, h),
        "wv": (d, k, h),
        "wo": (n, h, d),
    }
    traits = config.traits
    if traits.pre_norms:
        shapes = {"attn_norm": (d,), "mlp_norm": (d,)} | shapes
    if traits.experts is None or traits.experts.first:
        shapes |= {"w_gate": (d, f), "w_up": (d, f), "w_down": (f, d)}
    if traits.qkv_bias:
        shapes |= {"bq": (n, h), "bk": (k, h), "bv": (k, h)}
    if traits.o_bias:
        shapes |= {"bo": (d,)}
    if traits.qk_norm:
        shapes |= {"q_norm": (h,), "k_norm": (h,)}
    if traits.wide_qk_norm:
        shapes |= {"wide_q_norm": (n, h), "wide_k_norm": (k, h)}
    if traits.sinks:
        shapes |= {"sinks": (n,)}
    if traits.post_norms:
        shapes |= {"post_attn_norm": (d,), "post_mlp_norm": (d,)}
    if traits.mlp_bias:
        shapes |= {"b_gate": (f,), "b_up": (f,), "b_down": (d,)}
    if (experts := traits.experts) is not None:
        e, w = experts.number, experts.width
        shapes |= {"router": (d, e), "expert_gate": (e, d, w), "expert_up": (e, d, w), "expert_down": (e, w, d)}
        if experts.bias:
            shapes |= {"b_router": (e,), "b_expert_gate": (e, w), "b_expert_up": (e, w), "b_expert_down": (e, d)}
        if experts.scoring == "sigmoid":
            shapes |= {"choice_bias": (e,)}
        if s := experts.shared * w:
            shapes |= {"shared_gate": (d, s), "shared_up": (d, s), "shared_down": (s, d)}
    return shapes


def layers_with(config: LlamaConfig, name: str) -> range:
    """The layers that have a parameter of this name (without `layers.`): all, the first ones, or those after them."""
    first = 0 if config.traits.experts is None else config.traits.experts.first
    if first and name.startswith(("w_gate", "w_up", "w_down")):
        return range(first)
    if first and name.startswith(("expert_", "router", "choice_bias", "shared_")):
        return range(first, config.num_layers)
    return range(config.num_layers)


BIASES = frozenset(
    (
        *("bq", "bk", "bv", "bo", "b_gate", "b_up", "b_down", "sinks"),
        *("b_router", "choice_bias", "b_expert_gate", "b_expert_up", "b_expert_down"),
    )
)
"""Names of what is added, which random weights have as zeros."""

IN_FLOAT32 = frozenset(("choice_bias",))
"""Names of what is float32 in every model: numbers that decide between nearly equal ones."""


def param_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter, as `Llama.params()` and `Llama.from_params` use them.

    Layers are stacked: `"layers.wq"` is `[layers, hidden, heads, head_dim]`. `"lm_head"` `[hidden, vocab]` is absent
    when embeddings are tied.
    """
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, config.hidden_size)}
    for name, shape in layer_shapes(config).items():
        shapes[f"layers.{name}"] = (len(layers_with(config, name)), *shape)
    shapes["final_norm"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["lm_head"] = (config.hidden_size, config.vocab_size)
    return shapes
