"""RoPE's settings, read from and written as the RoPE part of a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from minference_jax.models.traits import Family

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
        positive = ["theta", "factor", "partial_rotary_factor"]
        positive += {"yarn": ["beta_fast", "beta_slow"], "llama3": ["low_freq_factor", "high_freq_factor"]}.get(
            self.kind, []
        )
        lists = ("short_factor", "long_factor") if self.kind == "longrope" else ()
        values = [(name, getattr(self, name)) for name in positive]
        values += [(name, value) for name in lists for value in getattr(self, name) or ()]
        for name, value in values:
            if not _SMALLEST < value < _LARGEST:
                label = "rope_theta" if name == "theta" else f"rope {name}"
                raise ValueError(f"{label} must be finite and positive, in float32 too, got {value}")
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if (value := getattr(self, name)) is not None and not -_LARGEST < value < _LARGEST:
                raise ValueError(f"rope {name} must be finite, got {value}")
        if self.partial_rotary_factor > 1:
            raise ValueError(f"rope: partial_rotary_factor must be in (0, 1], got {self.partial_rotary_factor}")
        if self.kind in ("dynamic", "llama3", "yarn", "longrope") and not self.original_max_position_embeddings:
            raise ValueError(f"rope kind {self.kind!r} needs original_max_position_embeddings")
        if self.kind == "longrope" and (self.short_factor is None or self.long_factor is None):
            raise ValueError("rope kind 'longrope' needs short_factor and long_factor")
        if self.kind == "yarn" and self.theta == 1:
            raise ValueError("rope kind 'yarn' divides by log theta: theta must not be 1")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise ValueError(f"rope: low_freq_factor must be below high_freq_factor, got {low} and {high}")

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the length of the sequence ("dynamic" and "longrope")."""
        return self.kind in ("dynamic", "longrope")


TOP_LEVEL = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""What a config.json may say of RoPE outside its RoPE dictionary."""
_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_MAY_BE_NULL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_SMALLEST, _LARGEST = 1e-30, 1e30  # float32 computes with these


def rope_from_hf(
    top: dict[str, Any], scaling: Mapping[str, Any], get: Callable[..., Any], family: Family, *, old_names: bool
) -> RopeConfig:
    """The RoPE of a flat `rope_parameters` or `rope_scaling` dictionary.

    `top` holds `TOP_LEVEL`, where there, and the family's defaults; `get(name)` reads any key. `old_names`: whether
    "su" and "yarn" mean LongRoPE, as in early Phi-3 checkpoints. Raises `ValueError` for what is unknown, missing, or
    of the wrong type or range.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if old_names and kind in ("su", "yarn"):
        kind = "longrope"
    known = family.rope_kinds or get_args(RopeKind)
    if kind not in known:
        raise ValueError(f"rope_type {kind!r} is not supported; supported: {', '.join(known)}")
    values: dict[str, Any] = {"kind": kind}
    values["theta"] = _number(top | dict(scaling), "rope_theta", 10_000.0)
    values["partial_rotary_factor"] = share = _number(top | dict(scaling), "partial_rotary_factor", 1.0)
    if not family.partial_rotary and share != 1.0:
        raise ValueError(f"partial_rotary_factor {share} is not supported for this family")
    length = get("max_position_embeddings")
    if kind == "dynamic":
        values["original_max_position_embeddings"] = length
    elif kind in ("llama3", "yarn", "longrope"):
        # Precedence as in transformers: the top-level key, then the one inside the scaling, then the model's length.
        original = scaling.get("original_max_position_embeddings", length)
        original = top.get("original_max_position_embeddings", original)
        if type(original) is not int or not 0 < original < 2**31:
            raise ValueError(f"original_max_position_embeddings must be a positive integer, got {original!r}")
        values["original_max_position_embeddings"] = original
        if kind != "llama3" and scaling.get("factor") is None:
            values["factor"] = length / original
    if missing := [name for name in _REQUIRED.get(kind, ()) if name not in scaling]:
        raise ValueError(f"rope_type {kind!r} lacks {', '.join(missing)}")
    if kind != "default":
        for name in {field.name for field in dataclasses.fields(RopeConfig)} - set(values):
            if name in scaling and not (scaling[name] is None and name in _MAY_BE_NULL):
                values[name] = _value(scaling, name)
    return RopeConfig(**values)


def _value(scaling: Mapping[str, Any], name: str) -> Any:
    value = scaling[name]
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list | tuple) or not all(type(x) in (int, float) for x in value):
            raise ValueError(f"rope {name} must be a list of numbers, got {value!r:.200}")
        return tuple(float(x) for x in value)
    if name == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"rope truncate must be true or false, got {value!r}")
        return value
    return _number(scaling, name, None)


def _number(values: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    value = values.get(name, otherwise)
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
