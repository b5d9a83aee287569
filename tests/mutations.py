"""Mutated JSON files of checkpoints: one change each, of every kind that a file may come with. A seed gives a sequence.

A change is a key → its new value, or `ABSENT`. Some changes contradict each other on purpose.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

ABSENT = "<absent>"

# Keys that many config.json have, or that another version of transformers writes, with a value that means something.
_OTHERS: dict[str, Any] = {
    "head_dim": 8,
    "sliding_window": 64,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
    "attention_bias": True,
    "mlp_bias": True,
    "attention_out_bias": True,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 128,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    "rope_theta": 5e4,
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "no_rope_layers": [0, 1],
    "no_rope_layer_interval": 2,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "query_pre_attn_scalar": 16,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "torch_dtype": "float16",
    "architectures": ["SomeModel"],
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "use_cache": True,
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "tie_word_embeddings": True,
    "mlp_only_layers": [0],
    "swiglu_limit": 3.0,
    "rope_local_base_freq": 2e4,
    "sliding_window_pattern": 3,
}
# Scalings that are whole, lack something, or hold something that they should not.
SCALINGS: tuple[Any, ...] = (
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 4},
    {"rope_type": "linear"},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": None, "truncate": None},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 0, "beta_slow": 0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": -3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": 0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": -1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0},
    {"rope_type": "yarn", "factor": "4.0", "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5},
    {"rope_type": "yarn", "type": "linear", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4, "rope_theta": "1e4"},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 4},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [0.0] * 4},
    {"rope_type": "longrope", "short_factor": 1.0, "long_factor": [2.0] * 4},
    {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    {"type": "mrope", "mrope_section": [1, 1, 2]},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    {"rope_type": "axial"},
    {"rope_type": "default", "factor": 4.0},
    {"rope_type": "Linear", "factor": 4.0},
    {"rope_type": None, "factor": 4.0},
    {"factor": 4.0},
    {"rope_type": 3},
    {"rope_theta": 5e4},
    {"rope_theta": None},
    {"rope_theta": float("nan")},
    {"full_attention": {"rope_theta": 5e4}, "sliding_attention": {"rope_theta": 1e3}},
    {"full_attention": {"rope_type": "linear", "factor": 2.0}},
    {"full_attention": None, "sliding_attention": {"rope_type": "default"}},
    {"sliding_attention": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 3.0},
    {},
    [],
    "linear",
    4.0,
)
_ANY: tuple[Any, ...] = (
    *(ABSENT, None, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, 1e-300, float("nan"), float("inf")),
    *(float("-inf"), True, False, "", "x", "8", "null", [], {}, [1], ["x"], {"x": 1}),
)


def _near(value: Any) -> Iterator[Any]:
    """Values that are like this one."""
    yield from _ANY
    if isinstance(value, bool):
        yield from (not value, int(value), str(value).lower())
    elif isinstance(value, int | float):
        yield from (-value, 2 * value, value + 1, value + 0.5, float(value), str(value), [value], [value, value])
        if value >= 2:
            yield value // 2
    elif isinstance(value, str):
        yield from (value.upper(), [value], {value: value})
    elif isinstance(value, list):
        yield from (value[:-1], value * 2, value[::-1], dict.fromkeys(map(str, value)), [None] * len(value))
        yield from ([str(item) for item in value], [[item] for item in value])
    elif isinstance(value, dict):
        yield from (list(value), list(value.items()), json.dumps(value))
        for key, inner in value.items():
            yield {name: other for name, other in value.items() if name != key}
            for other in _near(inner):
                yield {name: x for name, x in (value | {key: other}).items() if x != ABSENT}


def config_changes(config: dict[str, Any], random: random.Random) -> dict[str, Any]:
    """One change of a config.json."""
    kind = random.random()
    if kind < 0.2:
        change = {random.choice(("rope_scaling", "rope_parameters")): random.choice(SCALINGS)}
        if random.random() < 0.3:  # beside the other one
            change = {name: random.choice(SCALINGS) for name in ("rope_scaling", "rope_parameters")}
        return change
    if kind < 0.35:
        return contradictions(config, random)
    known = config if kind < 0.75 else _OTHERS
    key = random.choice([name for name in known if name != "model_type"])
    value = config.get(key, _OTHERS.get(key))
    return {key: random.choice([value, *_near(value)] if kind > 0.75 else list(_near(value)))}


def contradictions(config: dict[str, Any], random: random.Random) -> dict[str, Any]:
    """Values that are right alone and not together, or that only some models may have."""
    layers, vocabulary = config["num_hidden_layers"], config["vocab_size"]
    ids = (vocabulary, vocabulary - 1, -1, 2**31, [2, vocabulary], [], [2, -1], [2, 2], [2, None], 2.0, "2", [True])
    return random.choice(
        (
            {"head_dim": random.choice((7, 2 * config["hidden_size"], config.get("head_dim", 8) + 2, 1, 2))},
            {"num_attention_heads": random.choice((1, 3, 5, 16)), "head_dim": random.choice((ABSENT, None, 8, 16))},
            {"num_key_value_heads": random.choice((1, 3, 4, 8, 16, None, ABSENT))},
            {"hidden_size": random.choice((63, 66, 128)), "head_dim": random.choice((ABSENT, 8))},
            {
                "layer_types": [random.choice(("full_attention", "sliding_attention"))]
                * (layers + random.choice((-1, 1)))
            },
            {"layer_types": [random.choice(("chunked_attention", "linear_attention", "attention"))] * layers},
            {"layer_types": [random.choice(("full_attention", "sliding_attention")) for _ in range(layers)]},
            {"layer_types": ["sliding_attention"] * layers, "sliding_window": random.choice((None, 1, 40, 0, ABSENT))},
            {"layer_types": ["sliding_attention"] * layers, "use_sliding_window": False, "sliding_window": 40},
            {"use_sliding_window": True, "sliding_window": random.choice((None, 40, 1000)), "max_window_layers": 0},
            {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": random.choice((1, layers, 99))},
            {"sliding_window": 40, "max_position_embeddings": 32},
            {"eos_token_id": random.choice(ids)},
            {"bos_token_id": random.choice(ids)},
            {"pad_token_id": random.choice(ids)},
            {"tie_word_embeddings": not config["tie_word_embeddings"]},
            {"num_hidden_layers": random.choice((layers - 1, layers + 1, 1))},
            {"max_position_embeddings": random.choice((1, 32, 64, 65, 10**6))},
            {"no_rope_layers": [random.choice((0, 1)) for _ in range(layers + random.choice((0, 1, -1)))]},
            {"mlp_only_layers": random.choice(([0], [layers], [-1], None))},
            {"decoder_sparse_step": random.choice((2, 0, 1.0, "1"))},
            {
                "model_type": random.choice(
                    ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "Llama", "", None)
                )
            },
            {"quantization_config": random.choice(({}, None, {"quant_method": "fp8"}, "fp8", [], {"bits": 8}))},
            {"partial_rotary_factor": random.choice((0.5, 0.3, 0, 2, "0.5", None, 1, 1.0))},
            {"original_max_position_embeddings": random.choice((64, 1024, 0, None, "64"))},
        )
    )


def applied(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The config after a change."""
    return {key: value for key, value in (config | change).items() if value != ABSENT}


TOKENIZER: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": None,
    "add_bos_token": True,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1024,
    "padding_side": "left",
    "additional_special_tokens": ["<|end|>"],
    "added_tokens_decoder": {
        "0": {"content": "<s>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
        "1": {"content": "</s>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
    },
    "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
}
"""A tokenizer_config.json for the tokens of `SPECIAL`."""
SPECIAL = ("<s>", "</s>", "<pad>", "<|end|>")
_TEMPLATES: tuple[Any, ...] = (
    *("", "{{ messages", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% for m in messages %}", "{{ x.y.z }}"),
    *("{{ messages[0]['content'] }}", "{{ bos_token + messages[0].content }}", "{{ messages | tojson }}"),
    *([], [{"name": "default", "template": "{{ messages[0].content }}"}], [{"name": "rag", "template": "x"}]),
    *({"default": "{{ messages[0].content }}"}, [{"name": "default"}], [{"template": "x"}], ["x"], [1], None, 1),
)
_TOKENS: tuple[Any, ...] = (
    *("<s>", "<new>", "a", "", 1, None, True, ["</s>"], {"content": "</s>"}, {"content": "<new>", "special": True}),
    *({"__type": "AddedToken", "content": "</s>", "lstrip": True, "rstrip": False, "normalized": False}, {"x": 1}),
    {"__type": "AddedToken", "content": 1},
)


def tokenizer_changes(random: random.Random) -> dict[str, Any]:
    """One change of `TOKENIZER`."""
    kind = random.random()
    if kind < 0.2:
        return {"chat_template": random.choice(_TEMPLATES)}
    if kind < 0.45:
        return {random.choice(("bos_token", "eos_token", "pad_token", "unk_token")): random.choice(_TOKENS)}
    if kind < 0.6:
        decoder, place = TOKENIZER["added_tokens_decoder"], random.choice(("0", "3", "9999", "-1", "x", ""))
        entries = (
            {"content": "a", "special": False},
            {"content": "<s>"},
            {},
            None,
            "<s>",
            {"content": 3},
            {"content": ""},
        )
        return {"added_tokens_decoder": random.choice((decoder | {place: random.choice(entries)}, [], None, {}, "x"))}
    key = random.choice(list(TOKENIZER))
    return {key: random.choice(list(_near(TOKENIZER[key])))}


GENERATION: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": [1, 3], "pad_token_id": 2, "do_sample": True}
GENERATION |= {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "max_length": 100}


def generation_changes(random: random.Random) -> dict[str, Any]:
    """One change of `GENERATION`."""
    if random.random() < 0.3:
        values = (1, 3, -1, 10**6, [1], [], [1, 10**6], [3, 1, 1], [1, -1], [1, None], "1", ["1"], 1.0, True, {"1": 1})
        return {"eos_token_id": random.choice((*values, None, ABSENT))}
    key = random.choice(list(GENERATION))
    values = (0, 0.0, -1, -0.5, 2.0, 100, float("nan"), *_near(GENERATION[key]))
    return {key: random.choice(values)}
