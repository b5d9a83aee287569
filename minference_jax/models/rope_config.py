"""RoPE's settings, read from and written as the RoPE part of a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequencies and how they are stretched for long contexts.

    Only the fields of its `kind` are used; `minference_jax.models.rope` has the formulas.

    - `kind`: "default", "linear", "dynamic" (NTK), "llama3", "yarn" or "longrope".
    - `theta`: base wavelength.
    - `partial_rotary_factor`: share of each head's dimensions that is rotated (Phi-3 and GLM-4).
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
        numbers = [getattr(self, field.name) for field in dataclasses.fields(self)]
        numbers += [*(self.short_factor or ()), *(self.long_factor or ())]
        if not all(math.isfinite(x) for x in numbers if isinstance(x, int | float)):
            raise ValueError(f"rope: every number must be finite, got {self}")
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


def rope_from_hf(scaling: Mapping[str, Any], get: Callable[..., Any], *, partial: bool, old_names: bool) -> RopeConfig:
    """The RoPE of a flat `rope_parameters` or `rope_scaling` dictionary.

    `get(name, otherwise=None)` reads a top-level key or its family's default. `partial`: whether the family may rotate
    a part of each head; `old_names`: whether "su" and "yarn" mean LongRoPE, as in early Phi-3 checkpoints. Raises
    `ValueError` for what is unknown, missing or of the wrong type.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if old_names and kind in ("su", "yarn"):
        kind = "longrope"
    if kind not in get_args(RopeKind):
        raise ValueError(f"rope_type {kind!r} is not supported; supported: {', '.join(get_args(RopeKind))}")
    share = _number(scaling, "partial_rotary_factor", get("partial_rotary_factor", 1.0))
    if not partial and share != 1.0:
        raise ValueError(f"partial_rotary_factor {share} is supported for phi3 and glm4 only")
    length = get("max_position_embeddings")
    # Precedence as in transformers: the top-level key, then the one inside the scaling, then the model's length.
    original = get("original_max_position_embeddings", scaling.get("original_max_position_embeddings", length))
    if type(original) is not int or original <= 0:
        raise ValueError(f"original_max_position_embeddings must be a positive integer, got {original!r}")
    values: dict[str, Any] = {"kind": kind, "theta": _number(scaling, "rope_theta", get("rope_theta", 10_000.0))}
    values["partial_rotary_factor"] = share
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
                values[name] = _value(scaling, name)
    return RopeConfig(**values)


def _value(scaling: Mapping[str, Any], name: str) -> Any:
    value = scaling[name]
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list | tuple) or not all(isinstance(x, int | float) for x in value):
            raise ValueError(f"rope {name} must be a list of numbers, got {value!r}")
        return tuple(float(x) for x in value)
    if name == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"rope truncate must be true or false, got {value!r}")
        return value
    return _number(scaling, name, None)


def _number(scaling: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    value = scaling.get(name)
    value = otherwise if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"rope {name} must be a number, got {value!r}")
    return value


def rope_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
    """The `rope_scaling` dictionary of a config.json; None for plain RoPE. `rope_theta` is written beside it."""
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
    return result
