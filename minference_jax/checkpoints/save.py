"""Writes our parameters as a Hugging Face checkpoint directory that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from minference_jax.checkpoints import names
from minference_jax.checkpoints.gguf_split import open_gguf
from minference_jax.checkpoints.hf_files import find_gguf
from minference_jax.checkpoints.hub import local_checkpoint
from minference_jax.extras import naming_extra
from minference_jax.models.config import LlamaConfig
from minference_jax.models.params import param_shapes
from minference_jax.text.gguf_tokenizer import tokenizer_files

_MAX_SHARD_BYTES = 5_000_000_000
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)


def save_checkpoint(
    config: LlamaConfig,
    params: Mapping[str, Array],
    directory: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Writes config.json, generation_config.json and model.safetensors (in shards with an index where it is larger).

    **Arguments:**

    - `config`, `params`: as `load_checkpoint` returns them; the parameters keep their dtype.
    - `directory`: created; nothing appears under this name before all of it is written.
    - `tokenizer_from`: a checkpoint (directory or GGUF file) whose tokenizer is copied along.
    - `max_shard_bytes`: one shard, and the largest parameter, are held in host memory.

    Raises `FileExistsError` when `directory` exists and is not empty, and `ValueError` for parameters that do not fit
    the config or a `tokenizer_from` without a tokenizer.
    """
    with new_directory(directory) as scratch:
        write_checkpoint(config, params, scratch, tokenizer_from=tokenizer_from, max_shard_bytes=max_shard_bytes)


def write_checkpoint(
    config: LlamaConfig,
    params: Mapping[str, Array],
    directory: Path,
    *,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """`save_checkpoint` into a directory that exists, file by file."""
    expected = param_shapes(config)
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    if shapes != expected:
        different = sorted(name for name in shapes.keys() | expected if shapes.get(name) != expected.get(name))
        found = {name: (shapes.get(name), expected.get(name)) for name in different}
        raise ValueError(f"params do not fit the config; name: (shape given, shape expected): {found}")
    dtypes = {np.dtype(param.dtype).name for param in params.values()}
    hf_config = config.to_hf() | ({"torch_dtype": dtypes.pop()} if len(dtypes) == 1 else {})
    write_json(directory / "config.json", hf_config)
    tokens = {key: hf_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / "generation_config.json", {k: v for k, v in tokens.items() if v is not None})
    _write_tensors(config, params, directory, max_shard_bytes)
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, directory)


def copy_tokenizer(source: str | Path, directory: Path) -> None:
    """Puts the tokenizer of a checkpoint (directory or GGUF file) into a directory, as Hugging Face's files."""
    source = local_checkpoint(source)
    if gguf := find_gguf(source):
        for name, content in tokenizer_files(open_gguf(gguf).metadata).items():
            (directory / name).write_text(content, encoding="utf-8")
        return
    found = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not any(path.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for path in found):
        raise ValueError(f"tokenizer_from: {source} holds no tokenizer")
    for path in found:
        shutil.copyfile(path, directory / path.name)


@contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """A scratch directory that takes the name `directory` when the block ends well, and vanishes when it does not.

    Raises `FileExistsError` when `directory` exists and is not an empty directory.
    """
    directory = Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty; choose another directory or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        scratch.replace(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tensors(config: LlamaConfig, params: Mapping[str, Array], directory: Path, limit: int) -> None:
    with naming_extra("saving a checkpoint"):
        from safetensors.numpy import save_file

    shards = _plan_shards(config, params, limit)
    weight_map: dict[str, str] = {}
    host: dict[str, np.ndarray] = {}  # of the current group only: layers of one parameter follow each other
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, rows, place in shard:
            if host.keys() != {row.path for row in rows}:
                host = {row.path: np.asarray(params[row.path]) for row in rows}
            layouts = [names.Layout.of(row, config) for row in rows]
            tensor = np.empty(layouts[0].file_shape, host[rows[0].path].dtype)
            for row, layout in zip(rows, layouts, strict=True):
                layout.write(tensor, host[row.path][place])
            tensors[name] = tensor
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod((directory / "config.json").stat().st_mode)  # it is created readable by its owner only
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(param.size * param.dtype.itemsize for param in params.values())
        write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _plan_shards(config: LlamaConfig, params: Mapping[str, Array], limit: int):
    """Lists of (file name, its rows, place), each list at most `limit` bytes where a tensor alone is not larger."""
    shards: list[list[tuple[str, list[names.Row], names.Place]]] = [[]]
    filled = 0
    for rows in names.group_by_file_tensor(names.table(config, "hf").values(), "hf"):
        places = list(names.places(rows[0], config))
        size = sum(params[row.path].size * params[row.path].dtype.itemsize for row in rows) // len(places)
        for place in places:
            if shards[-1] and filled + size > limit:
                shards.append([])
                filled = 0
            shards[-1].append((names.file_name(rows[0], "hf", place), rows, place))
            filled += size
    return shards
