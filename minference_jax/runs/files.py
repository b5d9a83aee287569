"""Writing that says which file it was, and outputs that are looked at before the work."""

from __future__ import annotations

import contextlib
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
