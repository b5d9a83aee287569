"""A Hugging Face checkpoint directory as named tensors: config.json and safetensors files, nothing executed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes  # registers NumPy's bfloat16, which safetensors looks up by name
import numpy as np

from minference_jax.checkpoints import mxfp4
from minference_jax.checkpoints.gguf_split import first_part
from minference_jax.checkpoints.names import own_names
from minference_jax.extras import naming_extra
from minference_jax.models.config import LlamaConfig
from minference_jax.models.hf_config import model_type

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


# Directories without a config.json: a file that tells what they are → what to say.
_FOREIGN = {
    "adapter_config.json": "an adapter (LoRA or the like), not a model: merge it into its base model first",
    "adapters.safetensors": "an adapter of MLX, not a model: fuse it with its base model first",
    "model_index.json": "a diffusion pipeline (diffusers), not a language model",
    "params.json": "a checkpoint in its author's own layout (params.json); use the Hugging Face version of the model",
    "*.nemo": "a NeMo checkpoint; use the Hugging Face version of the model",
    "*.onnx": "an ONNX model; use the Hugging Face version with safetensors",
    "*.engine": "a TensorRT engine; use the Hugging Face version with safetensors",
    "*.mlmodel*": "a Core ML model; use the Hugging Face version with safetensors",
    "*.tflite": "a TensorFlow Lite model; use the Hugging Face version with safetensors",
    "*.litertlm": "a LiteRT model; use the Hugging Face version with safetensors",
    "saved_model.pb": "a TensorFlow model; use the Hugging Face version with safetensors",
}
_FOREIGN_WEIGHTS = {
    "tf_model.h5": "TensorFlow weights",
    "flax_model.msgpack": "Flax weights",
    "consolidated*.safetensors": "weights in their author's own layout (consolidated.safetensors)",
    "*.onnx": "an ONNX model",
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ValueError` naming the file when it is missing or anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


# Settings of generation_config.json that change even the most likely continuation → the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "num_beams", "guidance_scale"), (1, None)),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens"), (0, None)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"), ([], {}, None)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "stop_strings", "penalty_alpha"), ([], None)),
}


def unused_settings(directory: Path) -> dict[str, Any]:
    """What generation_config.json asks for, and generation here does not do, even where it takes the likeliest token.

    How to sample is not among it: callers say that.
    """
    path = directory / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    return {key: settings[key] for key, neutral in _NEUTRAL.items() if settings.get(key) not in neutral}


def read_hf_config(directory: Path) -> dict[str, Any]:
    """config.json, with the end-of-sequence ids of generation_config.json where there is one.

    Nothing else of generation_config.json is read: callers say how to sample, and `unused_settings` what is left out.
    Raises `ValueError` naming the directory, and the format it is in if it is one that we know and do not read.
    """
    config = _read_config_json(directory)
    generation = directory / "generation_config.json"
    if generation.exists() and (eos := read_json(generation).get("eos_token_id")) is not None:
        if not all(type(token) is int for token in (eos if isinstance(eos, list) else [eos])):
            raise ValueError(f"{generation}: eos_token_id must be a token's number or a list of them, got {eos!r:.200}")
        config["eos_token_id"] = eos  # chat models add their end of turn only here
    return config


def _read_config_json(directory: Path) -> dict[str, Any]:
    if not (directory / "config.json").exists():
        for pattern, what in _FOREIGN.items():
            if any(directory.glob(pattern)):
                raise ValueError(f"{directory} holds {what}")
    return read_json(directory / "config.json")


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` means: itself, or the only one in a directory without config.json; else None.

    Of a split model that is the first part. Raises `ValueError` when such a directory holds several models.
    """
    if path.is_file():
        with open(path, "rb") as file:
            return path if path.suffix == ".gguf" or file.read(4) == b"GGUF" else None
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1 and (first := first_part(found)):
            return first
        if len(found) > 1:
            raise ValueError(f"{path} holds {len(found)} GGUF files ({', '.join(p.name for p in found)}); name one")
        return found[0] if found else None
    return None


class HFFiles:
    """The tensors of a checkpoint directory. `config` is its config.json; `shapes` maps tensor names to shapes.

    Reads `model.safetensors`, else the shards that `model.safetensors.index.json` names, else
    `model-0000i-of-0000n.safetensors`. Only headers are read until `read`.
    Raises `ValueError` naming the file for anything missing, malformed or pickled. What the config alone tells is
    said before any other file is opened.
    """

    format = "hf"

    def __init__(self, directory: Path):
        self.path = directory
        config = _read_config_json(directory)
        try:
            model_type(config)  # said before anything that is wrong with another file
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        self.config = read_hf_config(directory)
        check_config(directory, self.config)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._handles: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        problems = []
        for shard in self._shards():
            problems += self._open(directory / shard)
        if problems:
            raise ValueError(f"{directory}: " + "; ".join(problems))
        self._mxfp4 = self._merge_mxfp4()
        self._names = own_names(self.shapes)
        self.shapes = {ours: self.shapes[theirs] for ours, theirs in self._names.items()}

    def _shards(self) -> list[str]:
        if (self.path / _SINGLE).exists():
            return [_SINGLE]
        if (self.path / _INDEX).exists():
            return self._shards_of_index()
        names = sorted(entry.name for entry in self.path.iterdir())
        numbers = [match for name in names if (match := _SHARD.fullmatch(name))]
        if numbers:
            total = int(numbers[0][2])
            expected = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
            found = [match[0] for match in numbers]
            if found != expected:
                absent = sorted(set(expected) - set(found))
                raise ValueError(f"{self.path}: the shards are not complete: missing {absent[:20]}, found {found[:20]}")
            return expected
        for pattern, what in _FOREIGN_WEIGHTS.items():
            if any(self.path.glob(pattern)):
                raise ValueError(f"{self.path} holds {what}; use the version of the model with {_SINGLE}")
        if pickles := [name for name in names if name.endswith(_PICKLES)]:
            raise ValueError(pickle_refusal(self.path / pickles[0]))
        raise ValueError(f"{self.path}: no {_SINGLE}, no {_INDEX} and no shards in this directory")

    def _shards_of_index(self) -> list[str]:
        index = self.path / _INDEX
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index}: weight_map must map tensor names to file names")
        shards = sorted(set(weight_map.values()))
        for name in shards:
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: {name!r} is not the name of a safetensors file in this directory")
        if absent := [name for name in shards if not (self.path / name).is_file()]:
            raise ValueError(f"{index}: {len(absent)} of {len(shards)} shards are missing: {absent[:20]}")
        return shards

    def _open(self, path: Path) -> list[str]:
        with naming_extra("reading a safetensors file"):
            from safetensors import SafetensorError, safe_open

        try:
            handle = safe_open(path, framework="np")
            entries = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: not a whole, valid safetensors file: {error}") from None
        problems = []
        for name, entry in entries.items():
            if name in self.shapes:
                problems.append(f"{name} is in more than one file")
            self.shapes[name] = tuple(entry.get_shape())
            self._handles[name] = handle
        if foreign := [name for name, entry in entries.items() if not _is_read(name, entry.get_dtype())]:
            one = f"{foreign[0]} has dtype {entries[foreign[0]].get_dtype()} (supported: {', '.join(_DTYPES)})"
            others = f", and {len(foreign) - 1} more tensors have such dtypes" if len(foreign) > 1 else ""
            problems.append(f"{one}{others}; the config says {self._stored()}")
        return problems[:20]

    def _stored(self) -> str:
        """What the config says of the model's kind and of how its weights are stored."""
        quantization = self.config.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        return f"{self.config.get('model_type')}, " + (f"quantized by {method}" if method else "not quantized")

    def _merge_mxfp4(self) -> set[str]:
        """Puts each weight in MXFP4 in the place of its two tensors; their names."""
        found = set(mxfp4.weights_in(self.shapes))
        for name in found:
            blocks, scales = (self.shapes.pop(f"{name}{part}") for part in (mxfp4.BLOCKS, mxfp4.SCALES))
            try:
                self.shapes[name] = mxfp4.shape(blocks, scales)
            except ValueError as error:
                raise ValueError(f"{self.path}: {name}: {error}") from None
        return found

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file; one in MXFP4 in bfloat16."""
        name = self._names[name]
        return mxfp4.decode(self._tensor, name) if name in self._mxfp4 else self._tensor(name)

    def _tensor(self, name: str) -> np.ndarray:
        return self._handles[name].get_tensor(name)

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Slices of one tensor, one for each axis; nothing else of it is read, except where it is in MXFP4."""
        name = self._names[name]
        if name in self._mxfp4:
            return mxfp4.decode(self._tensor, name)[index]
        return self._handles[name].get_slice(name)[index]


def _is_read(name: str, dtype: str) -> bool:
    """Whether a tensor is numbers of a dtype that is read, or a part of a weight in MXFP4."""
    return dtype in _DTYPES or (dtype == "U8" and name.endswith((mxfp4.BLOCKS, mxfp4.SCALES)))


def check_config(path: Path, config: dict[str, Any]) -> LlamaConfig:
    """The config of a checkpoint. Raises `ValueError` naming the path for a model that is not supported."""
    try:
        return LlamaConfig.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def pickle_refusal(path: Path) -> str:
    """Why a PyTorch file is not read, and what to do."""
    return (
        f"{path}: PyTorch's .bin and .pt files are pickles, which can run any code when they are read: refused; "
        "save the model as safetensors (model.save_pretrained(..., safe_serialization=True) in a place you trust)"
    )
