"""What a model is: sizes, traits and RoPE.

One config covers all families, because they differ in switches only; `models.families` is the table of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minference_jax.models.hf_config import read_hf, write_hf
from minference_jax.models.rope_config import RopeConfig as RopeConfig
from minference_jax.models.rope_config import RopeKind as RopeKind
from minference_jax.models.traits import Experts as Experts
from minference_jax.models.traits import LayerKind as LayerKind
from minference_jax.models.traits import Traits as Traits

_PLAIN_ROPE, _LLAMA = RopeConfig(), Traits()


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
        if self.traits.dual_chunk is not None and self.rope.depends_on_length:
            raise ValueError(f"dual chunk attention has RoPE of one kind for all lengths, not {self.rope.kind!r}")
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

        Of a model of pictures and text, its text part. `rope_scaling` counts where both it and `rope_parameters` are
        there, as in transformers. Keys that the family ignores are ignored, whatever they hold. Raises `ValueError`
        naming everything that is missing, malformed or unsupported, all at once.
        """
        return cls(**read_hf(config))

    def to_hf(self) -> dict[str, Any]:
        """The dictionary to write as `config.json`; `from_hf` reads it back to an equal config.

        RoPE is written in the layout of transformers 4 (`rope_theta`, `rope_scaling`), which version 5 reads too.
        Raises `ValueError` when `model_type` names no family or one that cannot say what this config does.
        """
        result = write_hf(self)
        if LlamaConfig.from_hf(result) != self:
            raise ValueError(f"a config.json of model_type {self.model_type!r} cannot express {self}")
        return result
