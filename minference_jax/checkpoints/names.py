"""The one table of conversion: our parameter ↔ its name in a Hugging Face checkpoint and in a GGUF file.

Layouts are written as `"(n h) d -> d n h"`: the axes of the file's tensor, then ours; parentheses merge axes.
Axis letters: v vocabulary, d hidden, f MLP width, n query heads, k key-value heads, h head dimension; `p r` are h split
as pairs and 2 (`(r p)`: the two halves that Hugging Face rotates, `(p r)`: the neighbours that GGUF's llama rotates).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from minference_jax.models.config import LlamaConfig
from minference_jax.models.params import param_shapes

ArrayT = TypeVar("ArrayT", bound=Any)  # a NumPy or a JAX array
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Row:
    """How one of our parameters lies in a file.

    - `path`: our name, as in `minference_jax.models.params.param_shapes`.
    - `hf`, `gguf`: names in the two formats; `{layer}` stands for the layer's number.
    - `layout`: axes in the file and ours, see the module's docstring.
    - `fused`: the row groups of a file tensor that holds several parameters; `part` is this parameter's place in it.
    """

    path: str
    hf: str
    gguf: str
    layout: str
    fused: tuple[str, ...] = ()
    part: int = 0


_ROWS = (
    Row("embed", "model.embed_tokens.weight", "token_embd.weight", "v d -> v d"),
    Row("final_norm", "model.norm.weight", "output_norm.weight", "d -> d"),
    Row("lm_head", "lm_head.weight", "output.weight", "v d -> d v"),
    Row("layers.attn_norm", "input_layernorm.weight", "attn_norm.weight", "d -> d"),
    Row("layers.mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight", "d -> d"),
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
    Row("layers.w_gate", "mlp.gate_proj.weight", "ffn_gate.weight", "f d -> d f"),
    Row("layers.w_up", "mlp.up_proj.weight", "ffn_up.weight", "f d -> d f"),
    Row("layers.w_down", "mlp.down_proj.weight", "ffn_down.weight", "d f -> f d"),
    Row("layers.b_gate", "mlp.gate_proj.bias", "ffn_gate.bias", "f -> f"),
    Row("layers.b_up", "mlp.up_proj.bias", "ffn_up.bias", "f -> f"),
    Row("layers.b_down", "mlp.down_proj.bias", "ffn_down.bias", "d -> d"),
)

_QKV, _GATE_UP = ("n h", "k h", "k h"), ("f", "f")
_PHI3_ROWS = (
    Row("layers.wq", "self_attn.qkv_proj.weight", "attn_qkv.weight", "(n h) d -> d n h", _QKV, 0),
    Row("layers.wk", "self_attn.qkv_proj.weight", "attn_qkv.weight", "(k h) d -> d k h", _QKV, 1),
    Row("layers.wv", "self_attn.qkv_proj.weight", "attn_qkv.weight", "(k h) d -> d k h", _QKV, 2),
    Row("layers.w_gate", "mlp.gate_up_proj.weight", "ffn_up.weight", "f d -> d f", _GATE_UP, 0),
    Row("layers.w_up", "mlp.gate_up_proj.weight", "ffn_up.weight", "f d -> d f", _GATE_UP, 1),
)

# llama.cpp rotates neighbouring pairs for its "llama" architecture, so its converter interleaves the rows of q and k.
_GGUF_LLAMA_LAYOUTS = {
    "layers.wq": "(n p r) d -> d n (r p)",
    "layers.wk": "(k p r) d -> d k (r p)",
    "layers.bq": "(n p r) -> n (r p)",
    "layers.bk": "(k p r) -> k (r p)",
}
_GGUF_INTERLEAVED = ("llama", "mistral", "smollm3", "granite")  # llama.cpp architectures that rotate so

# Names that may be in a file and are not parameters: RoPE tables, which the config describes, buffers of old versions
# (causal masks), and the scales of a quantized KV cache.
IGNORED = {
    "hf": re.compile(
        r"(.*\.)?(rotary_emb\.\w+|(self_attn|attention)\.(bias|masked_bias|[kvq]_scale|[kv]_proj\.[kv]_scale|kv_scale))"
    ),
    "gguf": re.compile(r"(blk\.\d+\.)?(rope_(freqs|factors_long|factors_short)|attn_rot_embd)\.weight"),
}
PREFIXES = ("model.", "", "language_model.model.", "model.language_model.", "language_model.")
"""What may stand before the names of a Hugging Face model's layers: of the base model alone, or of a larger one's text
part. Our rows spell out the first."""


def table(config: LlamaConfig, file_format: str) -> dict[str, Row]:
    """Path → row of every parameter of `config`, with layouts as in `file_format` ("hf" or "gguf")."""
    rows = {row.path: row for row in _ROWS}
    if config.model_type == "phi3":
        rows |= {row.path: row for row in _PHI3_ROWS}
    if file_format == "gguf" and config.model_type in _GGUF_INTERLEAVED:
        rows |= {path: replace(rows[path], layout=layout) for path, layout in _GGUF_LLAMA_LAYOUTS.items()}
    return {path: rows[path] for path in param_shapes(config)}


def file_name(row: Row, file_format: str, layer: int) -> str:
    """The name of the row's tensor of one layer (`layer` is ignored by rows outside the layers)."""
    name = row.hf if file_format == "hf" else row.gguf
    if not in_layers(row):
        return name
    return f"model.layers.{layer}.{name}" if file_format == "hf" else f"blk.{layer}.{name}"


def in_layers(row: Row) -> bool:
    return row.path.startswith("layers.")


def num_layers(row: Row, config: LlamaConfig) -> int:
    """How many tensors of the file the row stands for."""
    return config.num_layers if in_layers(row) else 1


def group_by_file_tensor(rows: Iterable[Row], file_format: str) -> list[list[Row]]:
    """Rows that share a fused tensor of the file, so that it is read once."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(file_name(row, file_format, 0), []).append(row)
    return list(groups.values())


@dataclass(frozen=True)
class Layout:
    """A row's layout with the sizes of one config. Hashable by value, so that it can be a static argument of a jit.

    - `file_shape`: of the file's tensor, all its fused parts included; `rows` are this parameter's.
    - `part_shape`, `axis_sizes`: of those rows, with axes merged as in the file and split into single axes.
    - `order`: the permutation of single axes; `shape`: ours.
    """

    file_shape: tuple[int, ...]
    rows: tuple[int, int]
    part_shape: tuple[int, ...]
    axis_sizes: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, row: Row, config: LlamaConfig) -> Layout:
        n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
        sizes = {"n": n, "k": k, "h": h, "p": h // 2, "r": 2}
        sizes |= {"v": config.vocab_size, "d": config.hidden_size, "f": config.intermediate_size}

        def shape_of(side: str) -> tuple[int, ...]:
            groups = re.findall(r"\(([\w ]+)\)|(\w)", side)
            return tuple(math.prod(sizes[axis] for axis in (many or one).split()) for many, one in groups)

        source, target = row.layout.split(" -> ")
        axes = re.findall(r"\w", source)
        part_shape = shape_of(source)
        heights = [math.prod(shape_of(group)) for group in row.fused] or [part_shape[0]]
        return cls(
            file_shape=(sum(heights), *part_shape[1:]),
            rows=(sum(heights[: row.part]), sum(heights[: row.part + 1])),
            part_shape=part_shape,
            axis_sizes=tuple(sizes[axis] for axis in axes),
            order=tuple(axes.index(axis) for axis in re.findall(r"\w", target)),
            shape=shape_of(target),
        )

    def read(self, tensor: ArrayT) -> ArrayT:
        """The file's tensor, of `file_shape`, as our parameter."""
        part = tensor[self.rows[0] : self.rows[1]]
        return part.reshape(self.axis_sizes).transpose(self.order).reshape(self.shape)

    def read_part(self, read: Callable[[Index], np.ndarray], index: Index) -> np.ndarray:
        """Slices of our parameter, from as little of the file's tensor as has them.

        `read(slices)`: those slices of the file's tensor. An axis that the file has inside another (the h of `(n h)`)
        is read whole.
        """
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

    def write(self, param: np.ndarray) -> np.ndarray:
        """Our parameter as its rows of the file's tensor: the inverse of `read`."""
        split = tuple(self.axis_sizes[axis] for axis in self.order)
        return param.reshape(split).transpose(np.argsort(self.order)).reshape(self.part_shape)


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
