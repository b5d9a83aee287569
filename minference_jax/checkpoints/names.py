"""The one table of conversion: our parameter ↔ its name in a Hugging Face checkpoint and in a GGUF file.

Layouts are written as `"(n h) d -> d n h"`: the axes of the file's tensor, then ours; parentheses merge axes.
Axis letters: v vocabulary, d hidden, f MLP width, n query heads, k key-value heads, h head dimension, e experts,
w their width, u that of shared ones; `p r` are h split as pairs and 2 (`(r p)`: the two halves that Hugging Face
rotates, `(p r)`: the neighbours that GGUF's llama rotates). An axis `r` that ours lacks alternates between parameters.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from minference_jax.models.config import LlamaConfig
from minference_jax.models.params import layers_with, param_shapes

ArrayT = TypeVar("ArrayT", bound=Any)  # a NumPy or a JAX array
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Row:
    """How one of our parameters lies in a file.

    - `path`: our name, as in `minference_jax.models.params.param_shapes`.
    - `hf`, `gguf`: names in the two formats, within the layer; `{expert}` stands for an expert's number.
    - `layout`: axes in the file and ours, see the module's docstring; `gguf_layout`: in a GGUF file, where another.
    - `fused`: the row groups of a file tensor that holds several parameters; `part` is this parameter's place in it.
    - `added`: what the file has added to our numbers. `first`: the first layer that has it.
    """

    path: str
    hf: str
    gguf: str
    layout: str
    fused: tuple[str, ...] = ()
    part: int = 0
    gguf_layout: str = ""
    added: float = 0.0
    first: int = 0

    @property
    def axes(self) -> int:
        """Leading axes of our parameter that the file spreads over tensors: none, layers, or layers and experts."""
        return self.path.startswith("layers.") + ("{expert}" in self.hf)


_ROWS = (
    Row("embed", "model.embed_tokens.weight", "token_embd.weight", "v d -> v d"),
    Row("final_norm", "model.norm.weight", "output_norm.weight", "d -> d"),
    Row("lm_head", "lm_head.weight", "output.weight", "v d -> d v"),
    Row("layers.attn_norm", "input_layernorm.weight", "attn_norm.weight", "d -> d"),
    Row("layers.mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight", "d -> d"),
    Row("layers.post_attn_norm", "post_self_attn_layernorm.weight", "post_attention_norm.weight", "d -> d"),
    Row("layers.post_mlp_norm", "post_mlp_layernorm.weight", "post_ffw_norm.weight", "d -> d"),
    Row("layers.wq", "self_attn.q_proj.weight", "attn_q.weight", "(n h) d -> d n h"),
    Row("layers.wk", "self_attn.k_proj.weight", "attn_k.weight", "(k h) d -> d k h"),
    Row("layers.wv", "self_attn.v_proj.weight", "attn_v.weight", "(k h) d -> d k h"),
    Row("layers.wo", "self_attn.o_proj.weight", "attn_output.weight", "d (n h) -> n h d"),
    Row("layers.bq", "self_attn.q_proj.bias", "attn_q.bias", "(n h) -> n h"),
    Row("layers.bk", "self_attn.k_proj.bias", "attn_k.bias", "(k h) -> k h"),
    Row("layers.bv", "self_attn.v_proj.bias", "attn_v.bias", "(k h) -> k h"),
    Row("layers.bo", "self_attn.o_proj.bias", "attn_output.bias", "d -> d"),
    Row("layers.q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight", "h -> h"),
    Row("layers.k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight", "h -> h"),
    Row("layers.wide_q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight", "(n h) -> n h"),
    Row("layers.wide_k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight", "(k h) -> k h"),
    Row("layers.w_gate", "mlp.gate_proj.weight", "ffn_gate.weight", "f d -> d f"),
    Row("layers.w_up", "mlp.up_proj.weight", "ffn_up.weight", "f d -> d f"),
    Row("layers.w_down", "mlp.down_proj.weight", "ffn_down.weight", "d f -> f d"),
    Row("layers.b_gate", "mlp.gate_proj.bias", "ffn_gate.bias", "f -> f"),
    Row("layers.b_up", "mlp.up_proj.bias", "ffn_up.bias", "f -> f"),
    Row("layers.b_down", "mlp.down_proj.bias", "ffn_down.bias", "d -> d"),
)

_QKV, _GATE_UP = ("n h", "k h", "k h"), ("f", "f")
_QKV_ROWS = (
    Row("layers.wq", "self_attn.qkv_proj.weight", "attn_qkv.weight", "(n h) d -> d n h", _QKV, 0),
    Row("layers.wk", "self_attn.qkv_proj.weight", "attn_qkv.weight", "(k h) d -> d k h", _QKV, 1),
    Row("layers.wv", "self_attn.qkv_proj.weight", "attn_qkv.weight", "(k h) d -> d k h", _QKV, 2),
)
_GATE_UP_ROWS = (
    Row("layers.w_gate", "mlp.gate_up_proj.weight", "ffn_up.weight", "f d -> d f", _GATE_UP, 0),
    Row("layers.w_up", "mlp.gate_up_proj.weight", "ffn_up.weight", "f d -> d f", _GATE_UP, 1),
)
_NORM_OF_MLP = Row("layers.mlp_norm", "post_attention_layernorm.weight", "post_attention_norm.weight", "d -> d")
_OLMO_ROWS = (
    Row("layers.post_attn_norm", "post_attention_layernorm.weight", "post_attention_norm.weight", "d -> d"),
    Row("layers.post_mlp_norm", "post_feedforward_layernorm.weight", "post_ffw_norm.weight", "d -> d"),
)


def _expert(projection: str, hf: str, kind: str, layout: str, gguf_layout: str, part: int = 0) -> Row:
    """A projection of all experts, or its biases. GGUF keeps them in one tensor."""
    path = f"layers.{'b_' if kind == 'bias' else ''}expert_{projection}"
    gguf = f"ffn_{projection}_exps.{kind}"
    return Row(path, f"mlp.experts.{hf}", gguf, layout, part=part, gguf_layout=gguf_layout)


_EXPERT_ROWS = (
    Row("layers.router", "mlp.gate.weight", "ffn_gate_inp.weight", "e d -> d e"),
    _expert("gate", "{expert}.gate_proj.weight", "weight", "w d -> d w", "e w d -> e d w"),
    _expert("up", "{expert}.up_proj.weight", "weight", "w d -> d w", "e w d -> e d w"),
    _expert("down", "{expert}.down_proj.weight", "weight", "d w -> w d", "e d w -> e w d"),
)

_FAMILY_ROWS: dict[str, tuple[Row, ...]] = {
    "phi3": (*_QKV_ROWS, *_GATE_UP_ROWS),
    "glm4": _GATE_UP_ROWS,
    "seed_oss": (_NORM_OF_MLP,),
    "olmo2": _OLMO_ROWS,
    "olmo3": _OLMO_ROWS,
    "gemma3_text": (
        Row("layers.mlp_norm", "pre_feedforward_layernorm.weight", "ffn_norm.weight", "d -> d"),
        *_OLMO_ROWS,
    ),
    "qwen3_moe": _EXPERT_ROWS,
    "glm4_moe": (
        *_EXPERT_ROWS,
        _NORM_OF_MLP,
        Row("layers.choice_bias", "mlp.gate.e_score_correction_bias", "exp_probs_b.bias", "e -> e"),
        Row("layers.shared_gate", "mlp.shared_experts.gate_proj.weight", "ffn_gate_shexp.weight", "u d -> d u"),
        Row("layers.shared_up", "mlp.shared_experts.up_proj.weight", "ffn_up_shexp.weight", "u d -> d u"),
        Row("layers.shared_down", "mlp.shared_experts.down_proj.weight", "ffn_down_shexp.weight", "d u -> u d"),
    ),
    "gpt_oss": (
        _NORM_OF_MLP,
        Row("layers.sinks", "self_attn.sinks", "attn_sinks.weight", "n -> n"),
        Row("layers.router", "mlp.router.weight", "ffn_gate_inp.weight", "e d -> d e"),
        Row("layers.b_router", "mlp.router.bias", "ffn_gate_inp.bias", "e -> e"),
        _expert("gate", "gate_up_proj", "weight", "e d (w r) -> e d w", "e w d -> e d w", 0),
        _expert("up", "gate_up_proj", "weight", "e d (w r) -> e d w", "e w d -> e d w", 1),
        _expert("down", "down_proj", "weight", "e w d -> e w d", "e d w -> e w d"),
        _expert("gate", "gate_up_proj_bias", "bias", "e (w r) -> e w", "e w -> e w", 0),
        _expert("up", "gate_up_proj_bias", "bias", "e (w r) -> e w", "e w -> e w", 1),
        _expert("down", "down_proj_bias", "bias", "e d -> e d", "e d -> e d"),
    ),
}
"""What a family names or lays out in its own way."""

# llama.cpp rotates neighbouring pairs for its "llama" architecture, so its converter interleaves the rows of q and k.
_GGUF_LLAMA_LAYOUTS = {
    "layers.wq": "(n p r) d -> d n (r p)",
    "layers.wk": "(k p r) d -> d k (r p)",
    "layers.bq": "(n p r) -> n (r p)",
    "layers.bk": "(k p r) -> k (r p)",
}
_GGUF_INTERLEAVED = ("llama", "mistral", "ministral3", "smollm3", "granite")  # llama.cpp architectures that rotate so

# Names that may be in a file and are not parameters: RoPE tables, which the config describes, buffers of old versions
# (causal masks), and the scales of a quantized KV cache.
IGNORED = {
    "hf": re.compile(
        r"(.*\.)?(rotary_emb\.\w+|(self_attn|attention)\.(bias|masked_bias|[kvq]_scale|[kv]_proj\.[kv]_scale|kv_scale))"
    ),
    "gguf": re.compile(r"(blk\.\d+\.)?(rope_(freqs|factors_long|factors_short)|attn_rot_embd)\.weight"),
}


def is_ignored(config: LlamaConfig, file_format: str, name: str) -> bool:
    """Whether a file's tensor is none of the model's: `IGNORED`, or of a layer after the last, which predicts ahead."""
    layer = re.match(r"(?:model\.layers|blk)\.(\d+)\.", name)
    ahead = config.model_type == "glm4_moe" and layer is not None and int(layer[1]) >= config.num_layers
    return ahead or IGNORED[file_format].fullmatch(name) is not None


PREFIXES = ("model.", "", "language_model.model.", "model.language_model.", "language_model.")
"""What may stand before the names of a Hugging Face model's layers: of the base model alone, or of a larger one's text
part. Our rows spell out the first."""


def table(config: LlamaConfig, file_format: str) -> dict[str, Row]:
    """Path → row of every parameter of `config`, with layouts as in `file_format` ("hf" or "gguf")."""
    rows = {row.path: row for row in (*_ROWS, *_FAMILY_ROWS.get(config.model_type, ()))}
    rows = {path: rows[path] for path in param_shapes(config)}
    for path, row in rows.items():
        if row.axes and (start := layers_with(config, path.removeprefix("layers.")).start):
            rows[path] = replace(row, first=start)
    if file_format == "gguf":
        rows = {path: _in_gguf(row, config) for path, row in rows.items()}
    return rows


def _in_gguf(row: Row, config: LlamaConfig) -> Row:
    """The row as it is in a GGUF file, which keeps all experts in one tensor, and each parameter in one of its own."""
    if row.gguf_layout:
        row = replace(row, hf=row.gguf, layout=row.gguf_layout, part=0)
    if config.model_type in _GGUF_INTERLEAVED:
        row = replace(row, layout=_GGUF_LLAMA_LAYOUTS.get(row.path, row.layout))
    if row.path.endswith("norm"):  # llama.cpp's converter adds the offset to the weights
        row = replace(row, added=config.traits.norm_offset or 0.0)
    return row


Place = tuple[int, ...]
"""Which tensor of a row: (), (layer,) or (layer, expert), the index of our stacked parameter."""


def file_name(row: Row, file_format: str, place: Place) -> str:
    """The name of one of the row's tensors."""
    name = row.hf if file_format == "hf" else row.gguf
    if not place:
        return name
    name = name.replace("{expert}", str(place[-1]))
    layer = place[0] + row.first
    return f"model.layers.{layer}.{name}" if file_format == "hf" else f"blk.{layer}.{name}"


def places(row: Row, config: LlamaConfig) -> Iterator[Place]:
    """The tensors of the file that the row stands for."""
    experts = config.traits.experts
    layers = len(layers_with(config, row.path.removeprefix("layers.")))
    counts = (layers, experts.number if experts else 0)[: row.axes]
    return itertools.product(*map(range, counts))


def group_by_file_tensor(rows: Iterable[Row], file_format: str) -> list[list[Row]]:
    """Rows that share a fused tensor of the file, so that it is read once."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(file_name(row, file_format, (0, 0)[: row.axes]), []).append(row)
    return list(groups.values())


@dataclass(frozen=True)
class Layout:
    """A row's layout with the sizes of one config. Hashable by value, so that it can be a static argument of a jit.

    - `file_shape`: of the file's tensor, all its fused parts included; `rows` are this parameter's, and `axis_sizes`
      theirs, split into single axes; `part_shape`, with axes merged as in the file.
    - `order`: the permutation of single axes; `shape`: ours.
    - `chosen`: an axis, and the one entry of it that is ours; None for all of the tensor.
    """

    file_shape: tuple[int, ...]
    rows: tuple[int, int]
    part_shape: tuple[int, ...]
    axis_sizes: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    chosen: tuple[int, int] | None = None

    @classmethod
    def of(cls, row: Row, config: LlamaConfig) -> Layout:
        n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
        sizes = {"n": n, "k": k, "h": h, "p": h // 2, "r": 2}
        sizes |= {"v": config.vocab_size, "d": config.hidden_size, "f": config.intermediate_size}
        if config.traits.experts is not None:
            experts = config.traits.experts
            sizes |= {"e": experts.number, "w": experts.width, "u": experts.shared * experts.width}

        def shape_of(side: str) -> tuple[int, ...]:
            groups = re.findall(r"\(([\w ]+)\)|(\w)", side)
            return tuple(math.prod(sizes[axis] for axis in (many or one).split()) for many, one in groups)

        source, target = row.layout.split(" -> ")
        axes = re.findall(r"\w", source)
        alternate = "r" in axes and "r" not in target
        kept = [axis for axis in axes if not (alternate and axis == "r")]
        part_shape = shape_of(source)
        heights = [math.prod(shape_of(group)) for group in row.fused] or [part_shape[0]]
        return cls(
            file_shape=(sum(heights), *part_shape[1:]),
            rows=(0, heights[0]) if alternate else (sum(heights[: row.part]), sum(heights[: row.part + 1])),
            part_shape=part_shape,
            axis_sizes=tuple(sizes[axis] for axis in axes),
            order=tuple(kept.index(axis) for axis in re.findall(r"\w", target)),
            shape=shape_of(target),
            chosen=(axes.index("r"), row.part) if alternate else None,
        )

    def read(self, tensor: ArrayT) -> ArrayT:
        """The file's tensor, of `file_shape`, as our parameter."""
        part = tensor[self.rows[0] : self.rows[1]].reshape(self.axis_sizes)
        if self.chosen is not None:
            axis, entry = self.chosen
            part = part[(slice(None),) * axis + (entry,)]
        return part.transpose(self.order).reshape(self.shape)

    def write(self, tensor: np.ndarray, param: np.ndarray) -> None:
        """Puts our parameter into the file's tensor: the inverse of `read`."""
        part = tensor[self.rows[0] : self.rows[1]].reshape(self.axis_sizes)  # a view: only axes are split
        if self.chosen is not None:
            axis, entry = self.chosen
            part = part[(slice(None),) * axis + (entry,)]
        part[...] = param.reshape([part.shape[axis] for axis in self.order]).transpose(np.argsort(self.order))

    def read_part(self, read: Callable[[Index], np.ndarray], index: Index) -> np.ndarray:
        """Slices of our parameter, from as little of the file's tensor as has them.

        `read(slices)`: those slices of the file's tensor. An axis that the file has inside another (the h of `(n h)`)
        is read whole.
        """
        if self.chosen is not None:
            return self.read(read(tuple(slice(0, size) for size in self.file_shape)))[index]
        sizes, late = list(self.axis_sizes), []
        inside = _grouped(self.axis_sizes, self.part_shape)
        places = _grouped(tuple(self.axis_sizes[axis] for axis in self.order), self.shape)
        wanted = [slice(0, size) for size in self.part_shape]
        for cut, size, place in zip(index, self.shape, places, strict=True):
            start, stop, _ = cut.indices(size)
            axes = [self.order[i] for i in place]
            group = next((i for i, group in enumerate(inside) if len(axes) == 1 and group[:1] == axes), None)
            late.append(slice(start, stop) if group is None else slice(None))
            if group is not None:
                step = self.part_shape[group] // size
                wanted[group] = slice(start * step, stop * step)
                sizes[axes[0]] = stop - start
        first = self.rows[0]
        wanted[0] = slice(first + wanted[0].start, first + wanted[0].stop)
        shape = [math.prod(sizes[self.order[i]] for i in place) for place in places]
        return read(tuple(wanted)).reshape(sizes).transpose(self.order).reshape(shape)[tuple(late)]


def _grouped(axes: tuple[int, ...], sizes: tuple[int, ...]) -> list[list[int]]:
    """For each size, which consecutive axes multiply to it."""
    groups, place = [], 0
    for size in sizes:
        group, product = [place], axes[place]
        while product != size:
            group.append(group[-1] + 1)
            product *= axes[group[-1]]
        groups.append(group)
        place = group[-1] + 1
    return groups


def own_names(names: Iterable[str]) -> dict[str, str]:
    """Name in our rows → name in a Hugging Face checkpoint, whatever stands before the names of its layers.

    Of a larger model, the tensors of its other parts are left out; a checkpoint of another kind keeps its names.
    """
    names = list(names)
    for prefix in PREFIXES:
        if f"{prefix}embed_tokens.weight" not in names:
            continue
        outer = prefix.removesuffix("model.") if prefix != "model.language_model." else ""
        found = {f"model.{name.removeprefix(prefix)}": name for name in names if name.startswith(prefix)}
        heads = (f"{outer}lm_head.", "lm_head.")
        found |= {f"lm_head.{name.split('lm_head.')[1]}": name for name in names if name.startswith(heads)}
        others = [name for name in names if name not in found.values()]
        return found if prefix.startswith(("language_", "model.l")) else found | {name: name for name in others}
    return {name: name for name in names}
