"""What a Llama-family model is: sizes, switches and RoPE, read from and written as a Hugging Face `config.json`.

One config covers five families, because they differ in switches only: Llama, Mistral, Qwen2 (bias on q, k, v),
Qwen3 (RMSNorm on the heads of q and k) and Phi-3 (fused projections, which conversion splits).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}

# A key that a config.json leaves out means its family's default in transformers, not an error.
_COMMON_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": None}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
    "phi3": {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequencies and how they are stretched for long contexts.

    Only the fields of its `kind` are used; `minference_jax.models.rope` has the formulas.

    - `kind`: "default", "linear", "dynamic" (NTK), "llama3", "yarn" or "longrope".
    - `theta`: base wavelength.
    - `partial_rotary_factor`: share of each head's dimensions that is rotated (Phi-3 family only).
    - `factor`: context stretch (all kinds but "default"; for "longrope" it sets the attention factor only).
    - `original_max_position_embeddings`: tokens seen in pretraining ("dynamic", "llama3", "yarn", "longrope").
    - `attention_factor`: multiplies cos and sin ("yarn", "longrope"); None derives it from `factor`.
    - `beta_fast`, `beta_slow`, `mscale`, `mscale_all_dim`, `truncate`: "yarn".
    - `low_freq_factor`, `high_freq_factor`: "llama3".
    - `short_factor`, `long_factor`: "longrope", one divisor per rotated pair.
    """

    kind: RopeKind = "default"
    theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise ValueError(f"rope kind must be one of {get_args(RopeKind)}, got {self.kind!r}")
        if not self.theta > 0 or not self.factor > 0 or not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(f"rope: theta and factor must be > 0 and partial_rotary_factor in (0, 1], got {self}")
        if self.kind in ("dynamic", "llama3", "yarn", "longrope") and not self.original_max_position_embeddings:
            raise ValueError(f"rope kind {self.kind!r} needs original_max_position_embeddings")
        if self.kind == "longrope" and (self.short_factor is None or self.long_factor is None):
            raise ValueError("rope kind 'longrope' needs short_factor and long_factor")

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the length of the sequence ("dynamic" and "longrope")."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class LlamaConfig:
    """Static description of a Llama-family decoder. Hashable: it is a static argument of every jitted function.

    Raises `ValueError` when sizes do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
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
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"the rotated part of head_dim={self.head_dim} must be even, got {self.rotary_dim}")
        for name, factors in (("short_factor", self.rope.short_factor), ("long_factor", self.rope.long_factor)):
            if self.rope.kind == "longrope" and factors is not None and len(factors) != self.rotary_dim // 2:
                raise ValueError(f"rope {name} must hold {self.rotary_dim // 2} numbers, got {len(factors)}")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that RoPE rotates; the rest pass unchanged."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Reads the dictionary of a `config.json`, in the layout of transformers 4 or 5.

        Sliding-window attention is accepted only where it cannot act (a window of at least
        `max_position_embeddings` tokens): a narrower one is reported as unsupported, not ignored.

        Raises `ValueError` naming everything that is missing or unsupported, all at once.
        """
        family = config.get("model_type")
        if family not in _ARCHITECTURES:
            raise ValueError(f"model_type {family!r} is not supported; supported: {', '.join(_ARCHITECTURES)}")
        defaults = _COMMON_DEFAULTS | _FAMILY_DEFAULTS[family]

        def get(name: str, otherwise: Any = None) -> Any:
            value = config.get(name, defaults.get(name, otherwise))
            return otherwise if value is None else value

        problems = [f"{name} is missing" for name in _SIZES if not isinstance(config.get(name), int)]
        problems += _unsupported(family, get)
        rope = None
        try:
            rope = _rope_from_hf(family, config, get)
        except ValueError as error:
            problems.append(str(error))
        if problems or rope is None:
            raise ValueError(f"this {family} config cannot be used: " + "; ".join(problems))

        eos = config.get("eos_token_id", defaults["eos_token_id"])
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=get("num_key_value_heads", config["num_attention_heads"]),
            head_dim=get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
            rope=rope,
            rms_norm_eps=float(get("rms_norm_eps")),
            tie_embeddings=bool(get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            max_position_embeddings=get("max_position_embeddings"),
            bos_token_id=config.get("bos_token_id", defaults["bos_token_id"]),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
            pad_token_id=get("pad_token_id"),
            model_type=family,
        )

    def to_hf(self) -> dict[str, Any]:
        """The dictionary to write as `config.json`; `from_hf` reads it back to an equal config.

        RoPE is written in the layout of transformers 4 (`rope_theta`, `rope_scaling`), which version 5 reads too.
        Raises `ValueError` when `model_type` names no family or one whose switches are different.
        """
        if self.model_type not in _ARCHITECTURES:
            raise ValueError(f"model_type {self.model_type!r} is not one of {', '.join(_ARCHITECTURES)}")
        if self.qkv_bias != (self.model_type == "qwen2") or self.qk_norm != (self.model_type == "qwen3"):
            raise ValueError(
                f"model_type {self.model_type!r} cannot express qkv_bias={self.qkv_bias}, qk_norm={self.qk_norm}"
            )
        eos = self.eos_token_ids
        result: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
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
            "sliding_window": None,
            "rope_theta": self.rope.theta,
            "rope_scaling": _rope_to_hf(self),
        }
        if self.model_type == "phi3":
            result["partial_rotary_factor"] = self.rope.partial_rotary_factor
            result["original_max_position_embeddings"] = (
                self.rope.original_max_position_embeddings or self.max_position_embeddings
            )
        if self.model_type in ("qwen2", "qwen3"):
            result["use_sliding_window"] = False
        return result


def _unsupported(family: str, get: Any) -> list[str]:
    """What this config asks for that the model does not do."""
    problems = []
    if get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act {get('hidden_act')!r} (only silu)")
    for name in ("attention_bias", "mlp_bias"):
        if get(name, False):
            problems.append(f"{name} (biases other than Qwen2's on q, k and v)")
    window = get("sliding_window")
    if family in ("qwen2", "qwen3") and not get("use_sliding_window", False):
        window = None
    if window is not None and window < get("max_position_embeddings"):
        limit = get("max_position_embeddings")
        problems.append(f"sliding_window {window} (acts within max_position_embeddings {limit}; not implemented)")
    other_layers = sorted(set(get("layer_types", ())) - {"full_attention"})
    if other_layers and window is not None:
        problems.append(f"layer_types {', '.join(other_layers)} (only full_attention)")
    if get("quantization_config"):
        problems.append("quantization_config (only unquantized weights, or GGUF files)")
    return problems


def _rope_from_hf(family: str, config: Mapping[str, Any], get: Any) -> RopeConfig:
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise ValueError("rope_parameters that differ by layer type are not supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if family == "phi3" and kind in ("su", "yarn"):  # early Phi-3 checkpoints named LongRoPE so
        kind = "longrope"
    if kind not in get_args(RopeKind):
        raise ValueError(f"rope_type {kind!r} is not supported; supported: {', '.join(get_args(RopeKind))}")

    partial = scaling.get("partial_rotary_factor", get("partial_rotary_factor", 1.0))
    if family != "phi3" and partial != 1.0:
        raise ValueError(f"partial_rotary_factor {partial} is supported for phi3 only")
    length = get("max_position_embeddings")
    # Precedence as in transformers: the top-level key, then the one inside the scaling, then the model's length.
    original = get("original_max_position_embeddings", scaling.get("original_max_position_embeddings", length))
    values: dict[str, Any] = {"kind": kind, "theta": scaling.get("rope_theta", get("rope_theta", 10_000.0))}
    values["partial_rotary_factor"] = partial
    if kind == "dynamic":
        values["original_max_position_embeddings"] = length
    elif kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = original
    if kind in ("yarn", "longrope") and scaling.get("factor") is None:
        values["factor"] = length / original
    required = {"linear": ("factor",), "dynamic": ("factor",), "longrope": ("short_factor", "long_factor")}
    required["llama3"] = ("factor", "low_freq_factor", "high_freq_factor")
    missing = [name for name in required.get(kind, ()) if scaling.get(name) is None]
    if missing:
        raise ValueError(f"rope_type {kind!r} lacks {', '.join(missing)}")
    if kind != "default":
        known = {field.name for field in dataclasses.fields(RopeConfig)} - set(values)
        for name in known & set(scaling):
            if scaling[name] is not None:
                value = scaling[name]
                values[name] = tuple(float(x) for x in value) if isinstance(value, list | tuple) else value
    return RopeConfig(**values)


def _rope_to_hf(config: LlamaConfig) -> dict[str, Any] | None:
    rope = config.rope
    if rope.kind == "default":
        return None
    result: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    fields: dict[str, tuple[str, ...]] = {
        "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": (
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
        "longrope": ("original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    }
    for name in fields.get(rope.kind, ()):
        value = getattr(rope, name)
        if value is not None:
            result[name] = list(cast(tuple, value)) if isinstance(value, tuple) else value
    if config.model_type == "phi3":
        # transformers 4 accepts exactly these three keys for Phi-3 and derives the rest from top-level ones.
        derived = config.max_position_embeddings / (rope.original_max_position_embeddings or 1)
        if rope.attention_factor is None and rope.factor == derived:
            result = {"type": "longrope", "short_factor": result["short_factor"], "long_factor": result["long_factor"]}
    return result
