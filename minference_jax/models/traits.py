"""What makes one model family different from another: the fields of `models.families`, its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP.

    - `number`, `chosen`: experts, and how many serve a token. `width`: of one expert.
    - `normalized`: the chosen experts' weights are divided by their sum, as if the softmax were over them alone.
    - `bias`: router and experts have biases (gpt-oss).
    - `scoring`: the router's numbers become a softmax, or each a sigmoid. With "sigmoid" (GLM-4.5), a bias of each
      expert counts in the choice and not in the weight; of `groups` of experts only the best `top_groups` (by their two
      best) can be chosen; and the chosen ones' sum is multiplied by `scale`.
    - `shared`: how many experts' widths an MLP has that serves every token besides. `first`: layers before this one
      have an MLP instead of experts.
    """

    number: int = 0
    chosen: int = 0
    width: int = 0
    normalized: bool = False
    bias: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    shared: int = 0
    first: int = 0


@dataclass(frozen=True)
class DualChunk:
    """Positions of prompts beyond `chunk_size` tokens (`models.dual_chunk`).

    - `chunk_size`: the longest distance that RoPE sees. `local_size`: how many nearest keys keep their true one.
    - `trained`: the length from which on scores grow with that of the prompt; None: they do not.
    """

    chunk_size: int
    local_size: int
    trained: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.local_size < self.chunk_size:
            raise ValueError(f"dual chunk attention needs 0 < local_size < chunk_size, got {self}")

    @property
    def stride(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_size - self.local_size


@dataclass(frozen=True)
class Traits:
    """What a model does differently from Llama. Each field is one switch, and Llama's value its default.

    - `qkv_bias`, `o_bias`, `mlp_bias`: biases of the projections.
    - `qk_norm`: RMSNorm on each head of q and k. `wide_qk_norm`: on all heads of a token's q, and of its k, as one.
    - `pre_norms`: RMSNorm on the input of attention and of the MLP. `post_norms`: on their outputs, before these are
      added.
    - `norm_offset`: norms multiply by this plus their weight, in float32 (Gemma: 1, gpt-oss: 0). None: they round to
      the model's dtype before they multiply by their weight.
    - `activation`: of the MLP's gate. `neighbours`: RoPE turns neighbouring dimensions (GLM-4), not the two halves.
    - `embed_scale`, `residual_scale`, `logit_divisor`: of the embeddings, of what a layer adds, of the logits.
    - `attention_scale`: of the scores; None for 1/√head_dim. `logit_cap`: c in c·tanh(logits/c); None for no cap.
    - `query_growth`: queries at position p are multiplied by 1 + this · log(1 + ⌊p / trained length⌋) (Ministral 3).
    - `sinks`: each head has a score without a key, which takes its share of the softmax (gpt-oss).
    - `experts`: None for one MLP. `dual_chunk`: None where long prompts have plain positions.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    norm_offset: float | None = None
    activation: Activation = "silu"
    neighbours: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    attention_scale: float | None = None
    logit_cap: float | None = None
    query_growth: float = 0.0
    sinks: bool = False
    experts: Experts | None = None
    dual_chunk: DualChunk | None = None


@dataclass(frozen=True)
class LayerKind:
    """What a layer has of its own.

    - `window`: whether it sees only the last `sliding_window` tokens.
    - `rope`: the model's ("main"), its second one ("local"), or none.
    """

    window: bool = False
    rope: Literal["main", "local", "none"] = "main"


@dataclass(frozen=True)
class Number:
    """A trait that a config.json holds as a number: value = key ** `power`. With `in_rope` the key is one of RoPE's."""

    key: str
    power: float = 1.0
    in_rope: bool = False


@dataclass(frozen=True)
class Family:
    """How a family's config.json is read.

    - `architecture`: the class that transformers names. `defaults`: of keys that a config.json leaves out. `nullable`:
      which of these keys may be null, which then means what it means where there is no default.
    - `traits`: those that every model of the family has.
    - `biases`: key → the traits that it sets. Keys that a family ignores are not there.
    - `numbers`: trait → the key that holds it. `experts`: field of `Experts` → the key that holds it.
    - `window`: which layers `sliding_window` is for: "none"; "all"; "from": those from `max_window_layers` on; "types":
      those that `layer_types` calls sliding; "no_rope": the same, by default those without RoPE. `switch`: only if
      `use_sliding_window` says so.
    - `pattern`: with "types" and no `layer_types`, every so manieth layer is not sliding; a key, or its value.
    - `partial_rotary`: whether a part of each head may be rotated. `rope`: where a config.json has none.
    - `rope_kinds`: the supported ones, where not all are. `local_rope`: layers with a window have a RoPE of their own,
      whose base is this key, or in this dictionary.
    - `dual_chunk`: whether `dual_chunk_attention_config` is read. `only`: key → the one value that is supported.
      `quantized`: methods whose checkpoints are read.
    """

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    nullable: tuple[str, ...] = ()
    traits: Traits = Traits()
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    numbers: Mapping[str, Number] = field(default_factory=dict)
    experts: Mapping[str, str] | None = None
    window: Literal["none", "all", "from", "types", "no_rope"] = "none"
    switch: bool = False
    pattern: int | str = 0
    partial_rotary: bool = False
    rope: Mapping[str, Any] = field(default_factory=dict)
    rope_kinds: tuple[str, ...] = ()
    local_rope: Literal["", "rope_local_base_freq", "rope_parameters"] = ""
    dual_chunk: bool = False
    only: Mapping[str, Any] = field(default_factory=dict)
    quantized: tuple[str, ...] = ()
