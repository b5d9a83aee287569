"""What may be wrong with the values of a `config.json`: each key that its family reads, by its type and range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from minference_jax.models.traits import Family

ACTIVATIONS = {"silu": ("silu", "swish"), "clamped_swiglu": ("silu",), "gelu_tanh": ("gelu_pytorch_tanh",)}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LONGEST = 2**31  # positions and lengths are int32
_MOST_LAYERS = 100_000
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

Get = Callable[..., Any]
"""`get(key, otherwise=None)`: the value of a key, its family's default, or `otherwise`. null is no value."""


def malformed(config: Mapping[str, Any], family: Family, get: Get) -> list[str]:
    """Which values are missing, null, of the wrong type, out of range or not finite."""
    multipliers = [number.key for number in family.numbers.values() if not number.in_rope]
    experts = dict(family.experts or {})
    own_switch, own_scale = experts.pop("normalized", None), experts.pop("scale", None)
    multipliers += [own_scale] if own_scale else []
    integers = [*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", *experts.values()]
    integers += _window_integers(family)
    numbers = ["rms_norm_eps", *multipliers]
    numbers += [family.local_rope] if family.local_rope == "rope_local_base_freq" else []
    switches = ["tie_word_embeddings", *family.biases]
    switches += ["use_sliding_window"] if family.switch else []
    switches += [own_switch] if own_switch else []

    named = [*multipliers, *experts.values(), *_window_integers(family)]
    required = {*_SIZES, "rms_norm_eps", "max_position_embeddings", *(key for key in named if key in family.defaults)}
    required -= {"sliding_window"}
    problems = [f"{key} is missing" for key in sorted(required) if get(key) is None]
    null = [key for key in ("num_key_value_heads", "head_dim") if key not in family.defaults]
    null += ["sliding_window", "final_logit_softcapping", *family.nullable, *required]
    read = {*integers, *numbers, *switches, "hidden_act", "hidden_activation"} & config.keys()
    problems += [f"{key} must not be null" for key in sorted(read - set(null)) if config[key] is None]
    problems += _wrong_integers(integers, get)
    problems += _wrong_numbers(numbers, multipliers, get)
    problems += [
        f"{key} must be true or false, got {get(key)!r}" for key in switches if type(get(key, False)) is not bool
    ]
    return problems + list(_wrong_tokens(config, get))


def _window_integers(family: Family) -> list[str]:
    """The keys that say which layers have a window, and how long it is."""
    if family.window == "none":
        return []
    keys = {"from": ["max_window_layers"], "no_rope": ["no_rope_layer_interval"]}.get(family.window, [])
    return ["sliding_window", *keys, *([family.pattern] if isinstance(family.pattern, str) else [])]


def _wrong_integers(keys: list[str], get: Get) -> list[str]:
    problems = []
    for key in keys:
        value, least = get(key), 0 if key in ("max_window_layers", "first_k_dense_replace") else 1
        if value is not None and (type(value) is not int or value < least):
            problems.append(f"{key} must be a positive integer, got {value!r}")
        elif value is not None and value >= _LONGEST:
            problems.append(f"{key} must be less than {_LONGEST:,}, got {value:,}")
    return problems


def _wrong_numbers(keys: list[str], positive: list[str], get: Get) -> list[str]:
    problems = []
    for key in keys:
        value = get(key)
        if value is not None and type(value) not in ((float,) if key == "rms_norm_eps" else (int, float)):
            problems.append(f"{key} must be a number, got {value!r}")
        elif value is not None and not -1e30 < value < 1e30:
            problems.append(f"{key} must be finite, and within float32's range, got {value}")
        elif value is not None and key in positive and value <= 0:
            problems.append(f"{key} must be positive, got {value}")
    return problems


def _wrong_tokens(config: Mapping[str, Any], get: Get) -> Iterator[str]:
    for key in _TOKENS:
        value = get(key)
        many = value if isinstance(value, list | tuple) and key == "eos_token_id" else [value]
        if value is not None and not all(type(x) is int for x in many):
            yield f"{key} must be a token's number, got {value!r}"
    pad, vocabulary = config.get("pad_token_id"), get("vocab_size")
    if type(pad) is int and type(vocabulary) is int and pad >= vocabulary > 0:
        yield f"pad_token_id {pad} is outside the vocabulary of {vocabulary}"


def unsupported(family: Family, get: Get) -> list[str]:
    """What a config whose values are well-formed asks for and the model does not do."""
    problems = []
    name = "hidden_activation" if family.traits.activation == "gelu_tanh" else "hidden_act"
    known = ACTIVATIONS[family.traits.activation]
    if get(name, known[0]) not in known:
        problems.append(f"{name} {get(name)!r} (only {', '.join(known)})")
    problems += [f"{key} {get(key)!r} (only {only!r})" for key, only in family.only.items() if get(key, only) != only]
    for key in ("quantization_config", "quantization", "compression_config"):
        if (found := get(key)) is not None:
            method = found.get("quant_method", found.get("mode", "")) if isinstance(found, Mapping) else found
            if not isinstance(method, str) or method not in family.quantized:
                problems.append(f"{key} {method} (a quantized checkpoint; only unquantized weights, or GGUF files)")
            break
    if get("num_hidden_layers") > _MOST_LAYERS:  # before anything loops over the layers of a hostile config
        problems.append(f"num_hidden_layers {get('num_hidden_layers'):,} (at most {_MOST_LAYERS:,})")
    return problems
