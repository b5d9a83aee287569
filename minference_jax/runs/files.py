"""Writing that says which file it was, and outputs that are looked at before the work."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Errors of the operating system within the block, such as "No space left on device", name this file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def strict_json(text: str | bytes) -> Any:
    """What a JSON text holds. Raises `ValueError` for a key that occurs twice in an object, and for NaN and infinities,
    which Python would take."""
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key[:80]!r} occurs twice in one object")
        out[key] = value
    return out


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between the settings of two runs, such as "batch 2 instead of 3"; "" where nothing does."""
    names = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
    return ", ".join(f"{name} {before.get(name)!r} instead of {now.get(name)!r}" for name in names)


def check_output_file(path: str | Path) -> None:
    """Raises `ValueError` unless `path` can be a file that is written: what work would find out at its end."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; a file is to be written there")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path.absolute().parent} is no directory")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"{path} can't be written: permission denied")


def check_output_folder(path: str | Path) -> None:
    """Raises `ValueError` unless `path` is a folder that can be written to, or can be made."""
    path = Path(path).absolute()
    there = next(one for one in (path, *path.parents) if one.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file; a folder is to be written at {path}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there} can't be written to: permission denied")
