"""What a model is: sizes, traits and RoPE, read from and written as a Hugging Face `config.json`.

One config covers all families, because they differ in switches only; `models.families` is the table of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minference_jax.models.families import FAMILIES, Family
from minference_jax.models.families import Experts as Experts
from minference_jax.models.families import Traits as Traits
from minference_jax.models.rope_config import RopeConfig as RopeConfig
from minference_jax.models.rope_config import RopeKind as RopeKind
from minference_jax.models.rope_config import rope_from_hf, rope_to_hf

# A key that a config.json leaves out means its family's default in transformers, not an error.
_COMMON_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": None}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_INTEGERS = (
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings"),
    *("sliding_window", "max_window_layers"),
)
_NUMBERS = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
# Models of pictures and text whose text part is a model of its own: the key that holds its config.
WRAPPERS: dict[str, str] = {}


_PLAIN_ROPE, _LLAMA = RopeConfig(), Traits()


@dataclass(frozen=True)
class LayerKind:
    """What a layer has of its own.

    - `window`: whether it sees only the last `sliding_window` tokens. `rope`: the model's ("main"), its second one
      ("local"), or none.
    """

    window: bool = False
    rope: Literal["main", "local", "none"] = "main"


@dataclass(frozen=True)
class LlamaConfig:
    """Static description of a decoder. Hashable: it is a static argument of every jitted function.

    - `traits`: what its family does differently from Llama.
    - `sliding_window`: tokens that a layer with a window sees, itself included; None where no layer has one.
    - `layer_kinds`: of each layer; empty where all are `LayerKind()`. `local_rope`: RoPE of layers that say so.

    Raises `ValueError` when sizes do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig = _PLAIN_ROPE
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    traits: Traits = _LLAMA
    sliding_window: int | None = None
    layer_kinds: tuple[LayerKind, ...] = ()
    local_rope: RopeConfig | None = None
    max_position_embeddings: int = 8192
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    model_type: str = "llama"

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_layers"),
            *("num_heads", "num_kv_heads", "head_dim", "max_position_embeddings"),
        ):
            value = getattr(self, name)
            if type(value) is not int or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps >= 0):
            raise ValueError(f"rms_norm_eps must be finite and not negative, got {self.rms_norm_eps}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"the rotated part of head_dim={self.head_dim} must be even, got {self.rotary_dim}")
        for name, factors in (("short_factor", self.rope.short_factor), ("long_factor", self.rope.long_factor)):
            if self.rope.kind == "longrope" and factors is not None and len(factors) != self.rotary_dim // 2:
                raise ValueError(f"rope {name} must hold {self.rotary_dim // 2} numbers, got {len(factors)}")
        if len(self.layer_kinds) not in (0, self.num_layers):
            raise ValueError(f"layer_kinds has {len(self.layer_kinds)} entries for {self.num_layers} layers")
        if self.windowed and (self.sliding_window is None or self.sliding_window <= 0):
            raise ValueError(f"sliding_window must be a positive integer, got {self.sliding_window!r}")
        if self.local_rope is None and any(kind.rope == "local" for kind in self.layer_kinds):
            raise ValueError("layer_kinds name a local RoPE, but local_rope is None")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that RoPE rotates; the rest pass unchanged."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def windowed(self) -> bool:
        """Whether any layer sees a window of the tokens only."""
        return any(kind.window for kind in self.layer_kinds)

    @property
    def context_length(self) -> int | None:
        """Tokens that the model and its RoPE scaling are meant for; None for a RoPE that grows with the length."""
        if self.rope.kind == "dynamic":
            return None
        stretched = self.rope.factor * (self.rope.original_max_position_embeddings or 0)
        return max(self.max_position_embeddings, int(stretched))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Reads the dictionary of a `config.json`, in the layout of transformers 4 or 5.

        `rope_scaling` counts where both it and `rope_parameters` are there, as in transformers. Keys that the family
        ignores are ignored, whatever they hold. Raises `ValueError` naming everything that is missing, malformed or
        unsupported, all at once.
        """
        config = text_config(config)
        name = config.get("model_type")
        if not isinstance(name, str) or name not in FAMILIES:
            raise ValueError(f"model_type {name!r} is not supported; supported: {', '.join((*FAMILIES, *WRAPPERS))}")
        family = FAMILIES[name]
        defaults = _COMMON_DEFAULTS | dict(family.defaults)

        def get(key: str, otherwise: Any = None) -> Any:
            value = config.get(key, defaults.get(key, otherwise))
            return otherwise if value is None else value

        problems = _malformed(config, family, get) or _unsupported(config, family, get)
        values: dict[str, Any] = {}
        if not problems:
            try:
                values = _ropes(name, config, family, get)
                values |= _layers(name, config, family, get)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError(f"this {name} config cannot be used: " + "; ".join(problems))
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=get("num_key_value_heads", heads),
            head_dim=get("head_dim", config["hidden_size"] // heads),
            rms_norm_eps=float(get("rms_norm_eps")),
            tie_embeddings=get("tie_word_embeddings", False),
            traits=_traits(family, config, get),
            max_position_embeddings=get("max_position_embeddings"),
            bos_token_id=_ids(config.get("bos_token_id", defaults["bos_token_id"]), 1),
            eos_token_ids=_ids(config.get("eos_token_id", defaults["eos_token_id"])),
            pad_token_id=_ids(get("pad_token_id"), 1),
            model_type=name,
            **values,
        )

    def to_hf(self) -> dict[str, Any]:
        """The dictionary to write as `config.json`; `from_hf` reads it back to an equal config.

        RoPE is written in the layout of transformers 4 (`rope_theta`, `rope_scaling`), which version 5 reads too.
        Raises `ValueError` when `model_type` names no family or one that cannot say what this config does.
        """
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type {self.model_type!r} is not one of {', '.join(FAMILIES)}")
        family = FAMILIES[self.model_type]
        eos = self.eos_token_ids
        result: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            "pad_token_id": self.pad_token_id,
            "sliding_window": self.sliding_window if self.windowed else None,
            "rope_theta": self.rope.theta,
            "rope_scaling": self._rope_scaling(),
        }
        if family.attention_bias:
            result["attention_bias"] = any(getattr(self.traits, name) for name in family.attention_bias)
        if family.mlp_bias:
            result["mlp_bias"] = self.traits.mlp_bias
        result |= {key: getattr(self.traits, trait) for trait, key in family.numbers.items()}
        if family.partial_rotary:
            result["partial_rotary_factor"] = self.rope.partial_rotary_factor
        if self.model_type == "phi3":
            original = self.rope.original_max_position_embeddings or self.max_position_embeddings
            result["original_max_position_embeddings"] = original
        if family.window == "switch":
            first = next((i for i, kind in enumerate(self.layer_kinds) if kind.window), self.num_layers)
            result |= {"use_sliding_window": self.windowed, "max_window_layers": first}
        if family.window == "types":
            names = {False: "full_attention", True: "sliding_attention"}
            result["layer_types"] = [
                names[kind.window] for kind in self.layer_kinds or (LayerKind(),) * self.num_layers
            ]
        if LlamaConfig.from_hf(result) != self:
            raise ValueError(f"a config.json of model_type {self.model_type!r} cannot express {self}")
        return result

    def _rope_scaling(self) -> dict[str, Any] | None:
        result, rope = rope_to_hf(self.rope), self.rope
        if result is not None and self.model_type == "phi3":
            # transformers 4 accepts exactly these three keys for Phi-3 and derives the rest from top-level ones.
            derived = self.max_position_embeddings / (rope.original_max_position_embeddings or 1)
            if rope.attention_factor is None and rope.factor == derived:
                return {"type": "longrope", **{key: result[key] for key in ("short_factor", "long_factor")}}
        return result


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model: of a model of pictures and text, its part; any other, as it is."""
    kind = config.get("model_type")
    inner = config.get("text_config")
    if not isinstance(kind, str) or kind not in WRAPPERS or not isinstance(inner, Mapping):
        return config
    tokens = {key: config[key] for key in ("eos_token_id", "tie_word_embeddings") if config.get(key) is not None}
    quantized = {key: config[key] for key in ("quantization_config", "quantization") if key in config}
    return {"model_type": WRAPPERS[kind]} | dict(inner) | tokens | quantized


def _malformed(config: Mapping[str, Any], family: Family, get: Any) -> list[str]:
    """Which values are missing, of the wrong type, out of range or not finite."""
    problems = [f"{name} is missing" for name in _SIZES if config.get(name) is None]
    for name in (*_SIZES, *_INTEGERS):
        value = get(name)
        if value is not None and (type(value) is not int or not 0 < value < 2**63):
            if name == "sliding_window" and family.window == "none":
                continue
            if name == "max_window_layers" and value == 0 and type(value) is int:
                continue
            problems.append(f"{name} must be a positive integer, got {value!r}")
    for name in (*_NUMBERS, *family.numbers.values()):
        value = get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            problems.append(f"{name} must be a number, got {value!r}")
        elif value is not None and not math.isfinite(value):
            problems.append(f"{name} must be finite, got {value}")
    for name in _SWITCHES:
        if not isinstance(get(name, False), bool):
            problems.append(f"{name} must be true or false, got {get(name)!r}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = get(name)
        many = value if isinstance(value, list | tuple) and name != "pad_token_id" else [value]
        if value is not None and not all(type(x) is int for x in many):
            problems.append(f"{name} must be a token's number, got {value!r}")
    return problems


def _unsupported(config: Mapping[str, Any], family: Family, get: Any) -> list[str]:
    """What this config asks for that the model does not do."""
    problems = []
    name = "hidden_activation" if family.traits.activation == "gelu_tanh" else "hidden_act"
    known = {"silu": ("silu", "swish"), "clamped_swiglu": ("silu",), "gelu_tanh": ("gelu_pytorch_tanh",)}
    if get(name, known[family.traits.activation][0]) not in known[family.traits.activation]:
        problems.append(f"{name} {get(name)!r} (only {', '.join(known[family.traits.activation])})")
    for key in ("quantization_config", "quantization", "compression_config"):
        if found := get(key):
            method = found.get("quant_method", found.get("mode", "")) if isinstance(found, Mapping) else found
            problems.append(f"{key} {method} (a quantized checkpoint; only unquantized weights, or GGUF files)")
            break
    return problems


def _ropes(name: str, config: Mapping[str, Any], family: Family, get: Any) -> dict[str, Any]:
    """`rope`, and `local_rope` where the family has one."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_scaling must be a dictionary, got {scaling!r}")
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise ValueError("rope_parameters that differ by layer type are not supported")
    return {"rope": rope_from_hf(scaling, get, partial=family.partial_rotary, old_names=name == "phi3")}


def _layers(name: str, config: Mapping[str, Any], family: Family, get: Any) -> dict[str, Any]:
    """`sliding_window` and `layer_kinds`."""
    layers, window = config["num_hidden_layers"], get("sliding_window")
    if (
        family.window == "none"
        or window is None
        or (family.window == "switch" and not get("use_sliding_window", False))
    ):
        return {}
    if layers > 100_000:  # before anything loops over the layers of a hostile config
        raise ValueError(f"num_hidden_layers is {layers:,}")
    if family.window == "all":
        slides = [True] * layers
    else:
        types = config.get("layer_types")
        if types is None and family.window == "switch":
            slides = [i >= get("max_window_layers", layers) for i in range(layers)]
        elif types is None:
            slides = [(i + 1) % family.pattern != 0 for i in range(layers)]
        else:
            slides = _slides(types, layers)
    # A window as long as the model's context hides nothing.
    if not any(slides) or window >= get("max_position_embeddings"):
        return {}
    return {"sliding_window": window, "layer_kinds": tuple(LayerKind(window=slide) for slide in slides)}


def _slides(types: Any, layers: int) -> list[bool]:
    kinds = {"full_attention": False, "sliding_attention": True}
    if not isinstance(types, list) or len(types) != layers or not all(isinstance(t, str) and t in kinds for t in types):
        raise ValueError(f"layer_types must name {', '.join(kinds)} for each of {layers} layers, got {types!r:.200}")
    return [kinds[kind] for kind in types]


def _traits(family: Family, config: Mapping[str, Any], get: Any) -> Traits:
    changes: dict[str, Any] = {trait: get(key) for trait, key in family.numbers.items() if get(key) is not None}
    for key, traits in (("attention_bias", family.attention_bias), ("mlp_bias", family.mlp_bias)):
        changes |= {trait: get(key, False) for trait in traits}
    return dataclasses.replace(family.traits, **changes)


def _ids(value: Any, most: int = 0) -> Any:
    """Token ids, without those below 0, which mean none. `most` 1: the only one, or None."""
    many = tuple(x for x in (value if isinstance(value, list | tuple) else (value,)) if x is not None and x >= 0)
    return (many[0] if many else None) if most else many
