"""GGUF models in several files: `NAME-00001-of-00004.gguf`, metadata in the first, tensors in all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from minference_jax.checkpoints.gguf_file import GGUFFile, GGUFTensor

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class SplitGGUF:
    """All parts of a split model as one file: `metadata`, `tensors` and `read` as `GGUFFile` has them."""

    def __init__(self, parts: list[GGUFFile]):
        self.path = parts[0].path
        self.metadata: dict[str, Any] = parts[0].metadata
        self.tensors: dict[str, GGUFTensor] = {}
        self._owner: dict[str, GGUFFile] = {}
        for part in parts:
            for name, tensor in part.tensors.items():
                if name in self.tensors:
                    raise ValueError(f"{part.path}: the tensor {name!r} is in another part too")
                self.tensors[name], self._owner[name] = tensor, part
        announced = self.metadata.get("split.tensors.count")
        if announced is not None and announced != len(self.tensors):
            raise ValueError(f"{self.path}: split.tensors.count is {announced}, but the parts hold {len(self.tensors)}")

    def read(self, name: str) -> np.ndarray:
        """One tensor, as `GGUFFile.read`."""
        return self._owner[name].read(name)

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Slices of one tensor, as `GGUFFile.read_part`."""
        return self._owner[name].read_part(name, index)


def open_gguf(path: Path) -> GGUFFile | SplitGGUF:
    """A GGUF file, or the whole model where `path` is a part of a split one.

    Raises `ValueError` for what `GGUFFile` refuses, and for parts that are missing or misnamed.
    """
    file = GGUFFile(path)
    count = file.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return file
    name = _PART.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise ValueError(f"{path}: a part of {count} is named NAME-0000i-of-{count:05d}.gguf; give it its name back")
    paths = [path.with_name(f"{name[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise ValueError(f"{path}: {len(missing)} of {count} parts are missing: {', '.join(missing[:20])}")
    return SplitGGUF([file if part == path else GGUFFile(part) for part in paths])


def first_part(paths: list[Path]) -> Path | None:
    """The first part where all files are parts of one model; else None."""
    names = [_PART.fullmatch(path.name) for path in paths]
    models = {(name[1], name[3]) for name in names if name}
    return min(paths) if len(models) == 1 and all(names) else None
