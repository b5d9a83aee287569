"""A reader of GGUF files: header, metadata and tensors, every count and offset checked against the file's size.

Format: the GGUF specification of the ggml project (docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minference_jax.extras import naming_extra

_MAGIC = b"GGUF"
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_NAME = 65_535  # the specification's limit on the length of a key
_MAX_DIMS = 4

# Type number → (name, values in a block, bytes of a block).
_TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
# Types that have a number and that nothing here decodes: files for one kind of processor, or of integers.
_OTHER_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    40: "NVFP4",
    41: "Q1_0",
}
_AT_ONCE = 1 << 22  # numbers that are dequantized at once where a part is read
_PLAIN = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: `shape` is NumPy's (slowest axis first, the reverse of the file's), `type` e.g. "Q4_1"."""

    shape: tuple[int, ...]
    type: str
    type_number: int
    offset: int
    num_bytes: int


class GGUFFile:
    """An open GGUF file. `metadata` maps keys to Python scalars, strings, lists of strings or NumPy arrays.

    Raises `ValueError` naming the file when it is not a whole, well-formed GGUF file that this reader supports.
    Nothing is read past the header until `read`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = self.path.stat().st_size
            if size < 24:
                raise ValueError(f"{self.path}: not a GGUF file: only {size} bytes")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 0
        try:
            self._parse()
        except _MalformedError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _parse(self) -> None:
        magic = self._take(4)
        if magic != _MAGIC:
            raise _MalformedError(f"not a GGUF file: it starts with {magic!r} instead of {_MAGIC!r}")
        version = self._scalar("<u4")
        if version not in (2, 3):
            hint = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise _MalformedError(f"GGUF version {version} is not supported{hint}; supported: 2, 3")
        num_tensors, num_keys = self._scalar("<u8"), self._scalar("<u8")
        self._check_count("metadata entries", num_keys, 8 + 4 + 1)
        self._check_count("tensors", num_tensors, 8 + 4 + 4 + 8)

        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string("a metadata key", _MAX_NAME)
            if key in self.metadata:
                raise _MalformedError(f"the metadata key {key!r} occurs twice")
            self.metadata[key] = self._value(key, self._scalar("<u4"))

        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise _MalformedError(f"general.alignment must be a power of two, got {alignment!r}")
        start = -(-self._position // alignment) * alignment
        self.tensors: dict[str, GGUFTensor] = {}
        for name, shape, number, offset in entries:
            if name in self.tensors:
                raise _MalformedError(f"the tensor {name!r} occurs twice")
            self.tensors[name] = self._locate(name, shape, number, start, offset, alignment)
        self._check_overlap()

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("a tensor name", _MAX_NAME)
        num_dims = self._scalar("<u4")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise _MalformedError(f"tensor {name!r} has {num_dims} dimensions (1 to {_MAX_DIMS} are possible)")
        dims = tuple(self._scalar("<u8") for _ in range(num_dims))
        return name, dims[::-1], self._scalar("<u4"), self._scalar("<u8")

    def _locate(self, name, shape, number: int, start: int, offset: int, alignment: int) -> GGUFTensor:
        if number not in _TENSOR_TYPES:
            known = ", ".join(known_name for known_name, _, _ in _TENSOR_TYPES.values())
            kind = _OTHER_TYPES.get(number, f"number {number}")
            raise _MalformedError(f"tensor {name!r} has the unsupported type {kind}; supported: {known}")
        type_name, block, block_bytes = _TENSOR_TYPES[number]
        if 0 in shape or shape[-1] % block:
            raise _MalformedError(
                f"tensor {name!r} of shape {shape} cannot be stored as {type_name} (blocks of {block})"
            )
        num_bytes = math.prod(shape) // block * block_bytes
        if offset % alignment:
            raise _MalformedError(f"tensor {name!r} starts at offset {offset}, which is not a multiple of {alignment}")
        end = start + offset + num_bytes
        if end > len(self._bytes):
            raise _MalformedError(
                f"truncated or corrupt: tensor {name!r} ends at byte {end:,} of a file of {len(self._bytes):,} bytes"
            )
        return GGUFTensor(shape, type_name, number, start + offset, num_bytes)

    def _check_overlap(self) -> None:
        ordered = sorted(self.tensors.items(), key=lambda item: item[1].offset)
        for (name, tensor), (next_name, next_tensor) in itertools.pairwise(ordered):
            if tensor.offset + tensor.num_bytes > next_tensor.offset:
                raise _MalformedError(f"tensors {name!r} and {next_name!r} overlap")

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantized: float32, or float16 or bfloat16 where it is stored so.

        Raises ModuleNotFoundError when a quantized tensor is asked for and the `gguf` package is not installed.
        """
        return self._rows(name, slice(None))

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Slices of one tensor, one for each axis. Rows of the first axis are dequantized a few at a time, so no more
        than their slices are held."""
        tensor = self.tensors[name]
        if len(tensor.shape) == 1:
            return self._rows(name, slice(None))[index]
        start, stop, _ = index[0].indices(tensor.shape[0])
        step = max(1, _AT_ONCE // math.prod(tensor.shape[1:]))
        pieces = [(first, min(first + step, stop)) for first in range(start, stop, step)]
        parts = [self._rows(name, slice(*piece))[:, *index[1:]].copy() for piece in pieces]
        return np.concatenate(parts)

    def _rows(self, name: str, rows: slice) -> np.ndarray:
        """Some rows of the first axis, which are whole blocks of a tensor that has another one."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self._bytes, np.uint8, tensor.num_bytes, tensor.offset)
        if tensor.type in _PLAIN:
            return raw.view(_PLAIN[tensor.type]).reshape(tensor.shape)[rows]
        with naming_extra(f"{self.path}: reading {tensor.type} tensors"):
            from gguf import GGMLQuantizationType, dequantize
        blocks = raw.reshape(*tensor.shape[:-1], -1)[rows]
        found = dequantize(blocks, GGMLQuantizationType(tensor.type_number))
        return found.reshape(*blocks.shape[:-1], tensor.shape[-1])

    def _take(self, count: int) -> bytes:
        if count > len(self._bytes) - self._position:
            raise _MalformedError(
                f"truncated or corrupt: the header needs {count:,} bytes at byte {self._position:,}, "
                f"but the file has {len(self._bytes):,} bytes"
            )
        start, self._position = self._position, self._position + count
        return self._bytes[start : self._position]

    def _scalar(self, dtype: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self._take(kind.itemsize), kind)[0].item()

    def _check_count(self, what: str, count: int, least_bytes: int) -> None:
        """Refuses a count that the rest of the file cannot hold, before anything loops or allocates over it."""
        left = len(self._bytes) - self._position
        if count * least_bytes > left:
            raise _MalformedError(f"truncated or corrupt: it announces {count:,} {what}, but has {left:,} bytes left")

    def _string(self, what: str, limit: int | None = None) -> str:
        (length,) = struct.unpack("<Q", self._take(8))
        if limit is not None and length > limit:
            raise _MalformedError(f"corrupt: {what} is {length:,} bytes long (at most {limit:,} are allowed)")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise _MalformedError(f"corrupt: {what} is not UTF-8") from None

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {key!r}")
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise _MalformedError(f"corrupt: the value of {key!r} has the unknown type {kind}")
        element, count = self._scalar("<u4"), self._scalar("<u8")
        if element == _STRING:
            self._check_count(f"strings in {key!r}", count, 8)
            return [self._string(f"an entry of {key!r}") for _ in range(count)]
        if element not in _SCALARS:
            raise _MalformedError(f"corrupt: the array {key!r} has elements of the unsupported type {element}")
        dtype = np.dtype(_SCALARS[element])
        self._check_count(f"values in {key!r}", count, dtype.itemsize)
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)


class _MalformedError(Exception):
    """What is wrong inside the file; `GGUFFile` adds the path."""
