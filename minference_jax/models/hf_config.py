"""A Hugging Face `config.json` as the fields of a `LlamaConfig`, and back; `models.families` knows its keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from minference_jax.models.families import FAMILIES, WRAPPERS
from minference_jax.models.hf_checks import ACTIVATIONS, Get, malformed, unsupported
from minference_jax.models.rope_config import TOP_LEVEL, RopeConfig, rope_from_hf, rope_to_hf
from minference_jax.models.traits import DualChunk, Experts, Family, LayerKind, Number, Traits

# A key that a config.json leaves out means its family's default in transformers, not an error.
_COMMON_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": None}
_TYPES = {"full_attention": False, "sliding_attention": True}


def read_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `LlamaConfig`. Raises `ValueError` naming all that is missing, malformed or unsupported."""
    name, config = model_type(config), text_config(config)
    family = FAMILIES[name]
    if family.experts and "num_experts" in family.experts.values() and "num_local_experts" in config:
        config = {"num_experts": config["num_local_experts"]} | dict(config)  # transformers knows it by both names
    defaults = _COMMON_DEFAULTS | dict(family.defaults)

    def get(key: str, otherwise: Any = None) -> Any:
        value = config.get(key, defaults.get(key))
        return otherwise if value is None else value

    problems = malformed(config, family, get) or unsupported(family, get)
    values: dict[str, Any] = {}
    if not problems and get("head_dim") is None and get("hidden_size") % get("num_attention_heads"):
        problems.append(f"hidden_size {get('hidden_size')} is no multiple of {get('num_attention_heads')} heads")
    if not problems:
        try:
            values = _ropes(name, config, family, get)
            values |= _layers(config, family, get)
            values["traits"] = _traits(config, family, get)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"this {name} config cannot be used: " + "; ".join(problems))
    heads, pad = get("num_attention_heads"), _ids(get("pad_token_id"), 1)
    return values | {
        "vocab_size": get("vocab_size"),
        "hidden_size": get("hidden_size"),
        "intermediate_size": get("intermediate_size"),
        "num_layers": get("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": get("num_key_value_heads", heads),
        "head_dim": get("head_dim", get("hidden_size") // heads),
        "rms_norm_eps": float(get("rms_norm_eps")),
        "tie_embeddings": get("tie_word_embeddings", False),
        "max_position_embeddings": get("max_position_embeddings"),
        "bos_token_id": _ids(config.get("bos_token_id", defaults["bos_token_id"]), 1),
        "eos_token_ids": _ids(config.get("eos_token_id", defaults["eos_token_id"])),
        "pad_token_id": pad if pad is None or pad < get("vocab_size") else None,  # a default of larger models
        "model_type": name,
    }


def model_type(config: Mapping[str, Any]) -> str:
    """The family of a config. Raises `ValueError` naming one that is not supported."""
    name = text_config(config).get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model_type {name!r} is not supported; supported: {', '.join((*FAMILIES, *WRAPPERS))}")
    return name


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model: of a model of pictures and text, its part; any other, as it is."""
    kind = config.get("model_type")
    inner = config.get("text_config")
    if not isinstance(kind, str) or kind not in WRAPPERS or not isinstance(inner, Mapping):
        return config
    tokens = {key: config[key] for key in ("eos_token_id", "tie_word_embeddings") if config.get(key) is not None}
    quantized = {key: config[key] for key in ("quantization_config", "quantization") if key in config}
    return {"model_type": WRAPPERS[kind]} | dict(inner) | tokens | quantized


def _ropes(name: str, config: Mapping[str, Any], family: Family, get: Get) -> dict[str, Any]:
    """`rope`, and `local_rope` where the family has one."""

    def read(scaling: Mapping[str, Any]) -> RopeConfig:
        top = {key: config[key] for key in TOP_LEVEL if key in config}
        return rope_from_hf(dict(family.defaults) | top, scaling, get, family, old_names=name == "phi3")

    if not family.local_rope:
        return {"rope": read(_scaling(config, family))}
    kinds = _mapping("rope_parameters", config.get("rope_parameters"), nested=True)
    if kinds and not kinds.keys() <= _TYPES.keys():
        raise ValueError(f"rope_parameters must hold {' and '.join(_TYPES)}, got {', '.join(map(str, kinds))}")
    full = _mapping("rope_parameters", kinds.get("full_attention"))
    local = _mapping("rope_parameters", kinds.get("sliding_attention"))
    full |= _mapping("rope_scaling", config.get("rope_scaling"))
    base = get("rope_local_base_freq", family.defaults["rope_theta"])
    return {"rope": read(full), "local_rope": read({"rope_theta": base} | local)}


def _scaling(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The settings of the model's RoPE beside those at top level."""
    found = [_mapping(key, config.get(key)) for key in ("rope_scaling", "rope_parameters")]
    return found[0] or found[1] or dict(family.rope)


def _mapping(name: str, value: Any, nested: bool = False) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dictionary, got {value!r:.200}")
    found = dict(value or {})
    if not nested and (inner := [key for key, x in found.items() if key in _TYPES or isinstance(x, Mapping)]):
        raise ValueError(f"{name} must hold numbers, one RoPE for all layers; got {', '.join(map(str, inner))}")
    return found


def _layers(config: Mapping[str, Any], family: Family, get: Get) -> dict[str, Any]:
    """`sliding_window` and `layer_kinds`."""
    layers = get("num_hidden_layers")
    # Where the switch is off, the windows of Qwen's and SmolLM3's models are forgotten.
    off = family.window == "none" or (family.switch and not get("use_sliding_window", False))
    window = None if off else get("sliding_window")
    turned = _turned(config, get, layers) if family.window == "no_rope" else [True] * layers
    slides = [False] * layers
    if family.window == "types":
        every = get(family.pattern) if isinstance(family.pattern, str) else family.pattern
        slides = [(i + 1) % every != 0 for i in range(layers)]
    elif window is not None and family.window == "from":
        slides = [i >= get("max_window_layers", layers) for i in range(layers)]
    elif window is not None and family.window == "no_rope":
        slides = [not turn for turn in turned]
    elif window is not None:
        slides = [True] * layers
    if (types := config.get("layer_types")) is not None:
        named = _slides(types, layers)
        if family.window in ("none", "all") and named != slides:
            raise ValueError(
                f"layer_types {types!r:.200}: the family's layers are alike, and sliding_window is {window}"
            )
        slides = named
    if any(slides) and window is None:
        raise ValueError(f"layers have a sliding window, and sliding_window is {get('sliding_window')} or switched off")
    kinds = tuple(
        LayerKind(window=slide, rope="local" if slide and family.local_rope else "main" if turn else "none")
        for slide, turn in zip(slides, turned, strict=True)
    )
    if set(kinds) <= {LayerKind()}:
        return {}
    return {"sliding_window": window if any(slides) else None, "layer_kinds": kinds}


def _turned(config: Mapping[str, Any], get: Get, layers: int) -> list[bool]:
    """Which layers have RoPE: those whose entry in `no_rope_layers` is 1, by default all but every so manieth."""
    flags = config.get("no_rope_layers")
    if flags is None:
        return [(i + 1) % get("no_rope_layer_interval") != 0 for i in range(layers)]
    if not isinstance(flags, list) or len(flags) < layers or not all(type(x) is int and x in (0, 1) for x in flags):
        raise ValueError(f"no_rope_layers must hold 0 or 1 for each of {layers} layers, got {flags!r:.200}")
    return [bool(flag) for flag in flags[:layers]]


def _slides(types: Any, layers: int) -> list[bool]:
    known = ", ".join(_TYPES)
    if (
        not isinstance(types, list)
        or len(types) != layers
        or not all(isinstance(t, str) and t in _TYPES for t in types)
    ):
        raise ValueError(f"layer_types must name {known} for each of {layers} layers, got {types!r:.200}")
    return [_TYPES[kind] for kind in types]


def _traits(config: Mapping[str, Any], family: Family, get: Get) -> Traits:
    changes: dict[str, Any] = {}
    for trait, number in family.numbers.items():
        if number.in_rope:
            changes[trait] = _rope_number(config, family, number.key)
        elif get(number.key) is not None:
            changes[trait] = get(number.key) ** number.power
    for key, traits in family.biases.items():
        changes |= {trait: get(key, False) for trait in traits}
    if family.experts is not None:
        changes["experts"] = dataclasses.replace(
            family.traits.experts or Experts(), **{field: get(key) for field, key in family.experts.items()}
        )
        _check_experts(changes["experts"], get("num_hidden_layers"))
    if family.dual_chunk:
        changes["dual_chunk"] = _dual_chunk(config)
    return dataclasses.replace(family.traits, **changes)


def _check_experts(experts: Experts, layers: int) -> None:
    if experts.number % experts.groups or experts.top_groups > experts.groups:
        raise ValueError(
            f"{experts.number} experts in {experts.groups} groups, of which {experts.top_groups} are chosen"
        )
    if experts.chosen > experts.number // experts.groups * experts.top_groups:
        raise ValueError(f"{experts.chosen} experts serve a token, but there are fewer")
    if experts.first >= layers:
        raise ValueError(f"the first {experts.first} of {layers} layers have no experts: none has")


def _dual_chunk(config: Mapping[str, Any]) -> DualChunk | None:
    found = _mapping("dual_chunk_attention_config", config.get("dual_chunk_attention_config"))
    if not found:
        return None
    keys = {"chunk_size": "chunk_size", "local_size": "local_size", "trained": "original_max_position_embeddings"}
    values = {field: found.get(key) for field, key in keys.items()}
    for field, value in values.items():
        if not (type(value) is int and 0 < value < 2**31) and not (field == "trained" and value in (None, 0)):
            raise ValueError(f"dual_chunk_attention_config: {keys[field]} must be a positive integer, got {value!r}")
    if config.get("use_sliding_window"):
        raise ValueError("dual_chunk_attention_config and use_sliding_window are not supported together")
    return DualChunk(found["chunk_size"], found["local_size"], values["trained"] or None)


def _rope_number(config: Mapping[str, Any], family: Family, key: str) -> float:
    """A number among the settings of RoPE that is none of RoPE's; a scaling given at load leaves the model's own."""
    found = _scaling(config, family).get(key, _mapping("rope_parameters", config.get("rope_parameters")).get(key))
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise ValueError(f"rope {key} must be a finite number, got {found!r}")
    return found


def _ids(value: Any, most: int = 0) -> Any:
    """Token ids, without those below 0, which mean none. `most` 1: the only one, or None."""
    many = tuple(x for x in (value if isinstance(value, list | tuple) else (value,)) if x is not None and x >= 0)
    return (many[0] if many else None) if most else many


def write_hf(config: Any) -> dict[str, Any]:
    """The `config.json` of a `LlamaConfig`. Raises `ValueError` when its `model_type` names no family."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type {config.model_type!r} is not one of {', '.join(FAMILIES)}")
    family, traits = FAMILIES[config.model_type], config.traits
    eos = config.eos_token_ids
    result: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
        "sliding_window": config.sliding_window if config.windowed else None,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config, family),
    }
    activation = "hidden_activation" if traits.activation == "gelu_tanh" else "hidden_act"
    result[activation] = ACTIVATIONS[traits.activation][0]
    result |= {key: any(getattr(traits, name) for name in names) for key, names in family.biases.items()}
    for trait, number in family.numbers.items():
        if not number.in_rope and getattr(traits, trait) is not None:
            result[number.key] = _key_value(getattr(traits, trait), number)
    if family.experts is not None and traits.experts is not None:
        result |= {key: getattr(traits.experts, field) for field, key in family.experts.items()}
    if traits.dual_chunk is not None:
        chunks = traits.dual_chunk
        sizes = {"chunk_size": chunks.chunk_size, "local_size": chunks.local_size}
        result["dual_chunk_attention_config"] = sizes | {"original_max_position_embeddings": chunks.trained or 0}
    if family.partial_rotary:
        result["partial_rotary_factor"] = config.rope.partial_rotary_factor
    if family.local_rope == "rope_local_base_freq" and config.local_rope is not None:
        result["rope_local_base_freq"] = config.local_rope.theta
    elif family.local_rope and config.local_rope is not None:
        local = {"rope_type": "default", "rope_theta": config.local_rope.theta}
        full = {"rope_theta": config.rope.theta} | (result.pop("rope_scaling") or {"rope_type": "default"})
        result["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    if config.model_type == "phi3":
        original = config.rope.original_max_position_embeddings or config.max_position_embeddings
        result["original_max_position_embeddings"] = original
    return result | _layer_keys(config, family)


def _layer_keys(config: Any, family: Family) -> dict[str, Any]:
    """The keys that say which layers have a window, and which have no RoPE."""
    kinds = config.layer_kinds or (LayerKind(),) * config.num_layers
    result: dict[str, Any] = {}
    if family.switch:
        result["use_sliding_window"] = config.windowed
    if family.window == "from":
        result["max_window_layers"] = next((i for i, kind in enumerate(kinds) if kind.window), config.num_layers)
    if family.window in ("types", "no_rope"):
        names = {slides: name for name, slides in _TYPES.items()}
        result["layer_types"] = [names[kind.window or kind.rope == "local"] for kind in kinds]
    if family.window == "no_rope":
        result["no_rope_layers"] = [int(kind.rope != "none") for kind in kinds]
    return result


def _key_value(value: float, number: Number) -> float:
    """The key's value of a trait: a whole number where it was one."""
    found = value ** (1 / number.power)
    return round(found) if number.power != 1 and math.isclose(found, round(found), rel_tol=1e-9) else found


def _rope_scaling(config: Any, family: Family) -> dict[str, Any] | None:
    result, rope = rope_to_hf(config.rope), config.rope
    extra = {number.key: getattr(config.traits, trait) for trait, number in family.numbers.items() if number.in_rope}
    if extra or family.rope:
        result = (result or {"rope_type": "default"}) | extra
    if result is not None and config.model_type == "phi3":
        # transformers 4 accepts exactly these three keys for Phi-3 and derives the rest from top-level ones.
        derived = config.max_position_embeddings / (rope.original_max_position_embeddings or 1)
        if rope.attention_factor is None and rope.factor == derived:
            return {"type": "longrope", **{key: result[key] for key in ("short_factor", "long_factor")}}
    return result
