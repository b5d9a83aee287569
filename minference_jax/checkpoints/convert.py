"""Checkpoints in and out: Hugging Face directories (safetensors) and GGUF files ↔ our stacked parameters.

`minference_jax.checkpoints.names` is the table of names and layouts; this file streams tensors through it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from minference_jax.checkpoints import names
from minference_jax.checkpoints.gguf_config import hf_config
from minference_jax.checkpoints.gguf_split import open_gguf
from minference_jax.checkpoints.hf_files import HFFiles, check_config, find_gguf, pickle_refusal
from minference_jax.checkpoints.hub import local_checkpoint
from minference_jax.checkpoints.save import save_checkpoint as save_checkpoint
from minference_jax.models.config import LlamaConfig
from minference_jax.models.hf_config import text_config
from minference_jax.models.params import param_shapes
from minference_jax.parallel.mesh import fitted
from minference_jax.parallel.specs import param_specs

Progress = Callable[[int, int], None]
_DTYPES = ("bfloat16", "float16", "float32")
_SHOWN = 20  # names listed of each kind of trouble


class TensorFiles(Protocol):
    """What conversion needs of a format: a config in Hugging Face's terms, and tensors by name."""

    path: Path
    format: str
    config: dict
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...


class GGUFFiles:
    """A GGUF file as `TensorFiles`."""

    format = "gguf"

    def __init__(self, path: Path):
        self._file = open_gguf(path)
        self.path = path
        self.config = hf_config(self._file)
        check_config(path, self.config)
        self.shapes = {name: tensor.shape for name, tensor in self._file.tensors.items()}
        self.read, self.read_part = self._file.read, self._file.read_part


def open_checkpoint(path: str | Path) -> TensorFiles:
    """Opens a checkpoint and reads its headers: a Hugging Face directory, a .gguf file, a directory with one, or
    the name of a model in the local cache of the Hugging Face hub ("org/name").

    Raises `ValueError` with one message that names the file, whatever is wrong with it.
    """
    path = local_checkpoint(path)
    if gguf := find_gguf(path):
        return GGUFFiles(gguf)
    if path.is_dir():
        return HFFiles(path)
    if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
        raise ValueError(pickle_refusal(path))
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: give the directory that holds it, since config.json is needed too")
    raise ValueError(f"{path}: neither a GGUF file nor a checkpoint directory")


def load_checkpoint(
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
    convert: Callable[[str, Array], Mapping[str, Array]] | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> tuple[LlamaConfig, dict[str, Array]]:
    """Reads a checkpoint into our stacked parameters on the default device, or in slices on those of a mesh.

    Parameters stream one at a time: host memory holds one stacked parameter, and a few of the file's tensors, besides
    what has been placed on the device. On a mesh it holds one device's slice of it instead, and slices of tensors: each
    process reads what its own devices hold.

    **Arguments:**

    - `path`: a Hugging Face directory with safetensors (whole or sharded), a .gguf file, or a directory with one.
    - `dtype`: "bfloat16", "float16" or "float32", for every parameter.
    - `progress`: called as `progress(done, total)` after each of the file's tensors.
    - `rope_scaling`: takes the place of the checkpoint's, in the words of a config.json, for prompts longer than the
      model was trained for: `{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}`.
    - `convert`: called with the name and array of each parameter as it is placed; what it returns is kept instead, so
      that the device never holds the whole model both ways (`fp8.quantize_param`).
    - `mesh`: of `minference_jax.parallel.make_mesh`; where each slice goes, `parallel.specs` says.

    **Returns:** the config, and name → array as in `minference_jax.models.params.param_shapes`.

    Tied embeddings follow transformers: an `lm_head` equal to the embedding is dropped, a different one is kept and
    the config becomes untied, and an embedding that is missing is taken from the head.

    Raises `ValueError`: a file that is malformed, truncated or pickled; an unsupported architecture, quantization or
    RoPE scaling; names that are missing, unexpected or of the wrong shape, all in one message; parameters with NaN or
    infinite values (in `dtype`: a float32 value may be too large for float16), which no working model has.
    """
    if jnp.dtype(dtype).name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    files = open_checkpoint(path)
    changes = {} if rope_scaling is None else {"rope_scaling": dict(rope_scaling)}
    config = check_config(files.path, dict(text_config(files.config)) | changes)
    if config.num_layers > len(files.shapes):  # before anything loops over the layers of a hostile config
        layers, tensors = f"{config.num_layers:,} layers", f"{len(files.shapes):,} tensors"
        raise ValueError(f"{files.path}: the config has {layers}, but the checkpoint holds {tensors}")
    config, aliases = _resolve_tying(files, config)
    groups = names.group_by_file_tensor(names.table(config, files.format).values(), files.format)
    _check_names(files, config, groups, aliases)

    if mesh is not None:
        mesh = fitted(mesh, config)
    specs = {} if mesh is None else param_specs(config, mesh)
    params: dict[str, Array] = {}
    not_finite: list[str] = []
    done, total = 0, sum(sum(1 for _ in names.places(rows[0], config)) for rows in groups)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for rows in groups:
            if mesh is not None:
                for row in rows:
                    reader = _SliceReader(files, config, row, aliases, jnp.dtype(dtype), pool)
                    value = reader.place(NamedSharding(mesh, specs[row.path]))
                    not_finite += reader.not_finite
                    params |= {row.path: value} if convert is None else convert(row.path, value)
                done += sum(1 for _ in names.places(rows[0], config))
                if progress is not None:
                    progress(done, total)
                continue
            reader = _GroupReader(files, config, rows, aliases, jnp.dtype(dtype))
            for trouble in pool.map(reader.place, names.places(rows[0], config)):
                not_finite += trouble
                done += 1
                if progress is not None:
                    progress(done, total)
            for path in list(reader.stacks):
                value = jnp.asarray(reader.stacks.pop(path))
                params |= {path: value} if convert is None else convert(path, value)
    _report(f"{files.path} cannot be used", {"NaN or infinite": not_finite})
    order = {name: place for place, name in enumerate(param_shapes(config))}
    return config, dict(sorted(params.items(), key=lambda item: order[item[0].removesuffix("_scale")]))


class _SliceReader:
    """Reads one stacked parameter slice by slice, each for one device."""

    def __init__(
        self,
        files: TensorFiles,
        config: LlamaConfig,
        row: names.Row,
        aliases: Mapping[str, str],
        dtype: np.dtype,
        pool: ThreadPoolExecutor,
    ):
        self._files, self._row, self._aliases, self._dtype, self._pool = files, row, aliases, dtype, pool
        self._layout, self._shape = names.Layout.of(row, config), param_shapes(config)[row.path]
        self._places = list(names.places(row, config))
        self.not_finite: list[str] = []

    def place(self, sharding: NamedSharding) -> Array:
        """The parameter: this process's devices get their slices, one after the other."""
        indices = sharding.addressable_devices_indices_map(self._shape)
        arrays, read = [], (None, None)
        for device, index in indices.items():
            if read[0] != index:  # what several devices hold is read once
                read = (index, self._read(index))
            arrays.append(jax.device_put(read[1], device))
        jax.block_until_ready(arrays)
        return jax.make_array_from_single_device_arrays(self._shape, sharding, arrays)

    def _read(self, index: Any) -> np.ndarray:
        sizes = [len(range(*cut.indices(size))) for cut, size in zip(index, self._shape, strict=True)]
        out = np.empty(sizes, self._dtype)

        def fill(place: names.Place) -> str | None:
            name = names.file_name(self._row, self._files.format, place)
            file_name = self._aliases.get(name, name)
            part = self._layout.read_part(partial(self._files.read_part, file_name), index[len(place) :])
            with np.errstate(over="ignore", invalid="ignore"):
                out[place] = _without(part, self._row.added).astype(self._dtype, copy=False)
            return None if np.all(np.isfinite(out[place])) else name

        for trouble in self._pool.map(fill, self._places):
            self.not_finite += [trouble] if trouble and trouble not in self.not_finite else []
        return out


def _without(tensor: np.ndarray, added: float) -> np.ndarray:
    return tensor - tensor.dtype.type(added) if added else tensor


class _GroupReader:
    """Fills the stacked host arrays of the parameters that share a file tensor, one of its tensors at a time."""

    def __init__(self, files: TensorFiles, config: LlamaConfig, rows: list[names.Row], aliases, dtype: np.dtype):
        self._files, self._rows, self._aliases, self._dtype = files, rows, aliases, dtype
        self._layouts = [names.Layout.of(row, config) for row in rows]
        shapes = param_shapes(config)
        self.stacks = {row.path: np.empty(shapes[row.path], dtype) for row in rows}

    def place(self, place: names.Place) -> list[str]:
        """Reads, casts and transposes one file tensor; returns its name in a list if it is not finite."""
        name = names.file_name(self._rows[0], self._files.format, place)
        with np.errstate(over="ignore", invalid="ignore"):  # a cast that overflows is found below
            tensor = _without(self._files.read(self._aliases.get(name, name)), self._rows[0].added)
            tensor = tensor.astype(self._dtype, copy=False)
        # NumPy copies plain integers faster than bfloat16, and compares them without Python's lock.
        bits = tensor.view(f"u{self._dtype.itemsize}")
        for row, layout in zip(self._rows, self._layouts, strict=True):
            stack = self.stacks[row.path].view(bits.dtype)
            stack[place] = layout.read(bits)
        exponent = np.array(np.inf, self._dtype).view(bits.dtype)
        return [name] if np.any(bits & exponent == exponent) else []


def _resolve_tying(files: TensorFiles, config: LlamaConfig) -> tuple[LlamaConfig, dict[str, str]]:
    """The config with `tie_embeddings` as the tensors have it, and aliases: expected name → name in the file."""
    rows = names.table(dataclasses.replace(config, tie_embeddings=False), files.format)
    embed, head = (names.file_name(rows[path], files.format, ()) for path in ("embed", "lm_head"))
    if not config.tie_embeddings or head not in files.shapes:
        return config, {}
    if embed not in files.shapes:
        return config, {embed: head}
    if files.shapes[embed] == files.shapes[head] and np.array_equal(files.read(embed), files.read(head)):
        return config, {head: embed}
    return dataclasses.replace(config, tie_embeddings=False), {}


def _check_names(files: TensorFiles, config: LlamaConfig, groups, aliases: Mapping[str, str]) -> None:
    """Compares the names and shapes of the file with the config's, and reports every difference at once."""
    expected = {}
    for rows in groups:
        shape = names.Layout.of(rows[0], config).file_shape
        for place in names.places(rows[0], config):
            name = names.file_name(rows[0], files.format, place)
            expected[aliases.get(name, name)] = shape
    known = expected.keys() | aliases.keys()
    troubles = {
        "missing": [name for name in expected if name not in files.shapes],
        "unexpected": [
            name for name in files.shapes if name not in known and not names.IGNORED[files.format].fullmatch(name)
        ],
        "wrongly shaped": [
            f"{name} {files.shapes[name]} instead of {shape}"
            for name, shape in expected.items()
            if files.shapes.get(name, shape) != shape
        ],
    }
    _report(f"{files.path} does not fit its {config.model_type} config of {config.num_layers} layers", troubles)


def _report(subject: str, troubles: Mapping[str, list[str]]) -> None:
    parts = []
    for kind, found in troubles.items():
        if found:
            shown = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
            parts.append(f"{len(found)} {kind}: {shown}")
    if parts:
        raise ValueError(f"{subject}: " + "; ".join(parts))
