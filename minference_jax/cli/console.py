"""What the commands share: progress on standard error, clean standard output, reading files, the compile cache."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Update = Callable[[int, int], None]


def stdout() -> Console:
    """For results meant for people. Made anew at each call, as tests replace `sys.stdout`."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())


def stderr() -> Console:
    """For everything that is no result. In a file or pipe, lines (and the paths in them) are not broken."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())


def print_json(value: Any) -> None:
    """One JSON document, and nothing else, on standard output. NaN and infinities become null: JSON has none."""
    print(json.dumps(_finite(value), ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):  # NumPy's and JAX's scalars
        value = value.item()
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


@contextlib.contextmanager
def progress(label: str, *, show: bool = True) -> Iterator[Update]:
    """A bar on standard error, as `update(done, total)`; a spinner until the first call. Silent without a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


MAX_TOKENS = 1 << 24
"""Longest prompt or answer that options accept: longer than any, so a larger number is a mistake."""

MAX_BATCH = 1 << 16
"""Most prompts at once that options accept."""

MAX_TEXT_BYTES = 1 << 30
"""Of a text that a command reads: as much as 200 million tokens, and an end to what has none, such as /dev/zero."""


def read_text(name: str) -> str:
    """The UTF-8 text of a file, or of standard input for "-". Raises `ValueError` naming a file that is no text."""
    if name == "-":
        raw = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    else:
        with open(name, "rb") as file:
            raw = file.read(MAX_TEXT_BYTES + 1)
    if len(raw) > MAX_TEXT_BYTES:
        raise ValueError(f"{name} has more than {MAX_TEXT_BYTES:,} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_full_text(name: str) -> str:
    """`read_text` of a file that must hold more than white space."""
    text = read_text(name)
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text


def check_picture(option: str, path: Path) -> None:
    """Ends the program with status 2 unless a picture can be written to `path`."""
    from minference_jax.runs.files import check_output_file
    from minference_jax.viz.figure import check_path

    with usage(option):
        check_output_file(check_path(path))


def usage_error(message: str) -> typer.BadParameter:
    """An error that ends the program with status 2."""
    return typer.BadParameter(message)


@contextlib.contextmanager
def usage(option: str) -> Iterator[None]:
    """`ValueError` and `TypeError` within the block mean that the option was used wrongly: they end with status 2."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise usage_error(f"{option}: {error}") from None


def dtype_or_default(dtype: str) -> str:
    """The value of --dtype, or without one what models have here by default. Another word ends with status 2."""
    import jax

    if dtype not in ("", "float32", "bfloat16", "float16"):
        raise usage_error(f"--dtype: dtype must be one of float32, bfloat16 or float16, got {dtype!r}")
    return dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def split_names(option: str, text: str) -> list[str]:
    """Names at the commas, each once. At least one, and none empty, or the command line is wrong."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise usage_error(f"{option} must be names with commas, got {text!r}")
    return list(dict.fromkeys(names))


def cache_directory() -> Path:
    """Where the program keeps what it can make again: MINFERENCE_CACHE, else a folder of the user's cache."""
    if named := os.environ.get("MINFERENCE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minference_jax"


def use_most_of_the_gpu() -> None:
    """Lets JAX take 92 % of a GPU's memory instead of 75 %, unless XLA_PYTHON_CLIENT_MEM_FRACTION says how much."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")


def enable_compile_cache() -> None:
    """Keeps compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where (empty: nowhere)."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
