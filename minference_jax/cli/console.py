"""What the commands share: clean standard output, reading files, wrong usage, the compile cache."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console


def stdout() -> Console:
    """For results meant for people. Made anew at each call, as tests replace `sys.stdout`."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())


def stderr() -> Console:
    """For everything that is no result. In a file or pipe, lines (and the paths in them) are not broken."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())


def show_table(table: Any) -> None:
    """A rich table on standard output, never narrower than 140 columns."""
    console = stdout()
    console.width = max(console.width, 140)
    console.print(table)


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


def read_rows(path: Path) -> dict[str, Any]:
    """What `--json` of a benchmark printed before. Raises `ValueError` naming a file that holds anything else."""
    try:
        found = json.loads(read_full_text(str(path)))
    except ValueError as error:
        raise ValueError(f"{path} is not what --json printed: {error}") from None
    if not isinstance(found, dict) or not {"rows", "environment"} <= found.keys():
        raise ValueError(f"{path} is not what --json printed: it has no rows and environment")
    return found


DTYPES = ("float32", "bfloat16", "float16")
"""Of weights and activations."""


def chosen_dtype(text: str) -> str:
    """The value of `--dtype`, or without one float32 on a CPU and bfloat16 elsewhere. Ends with status 2 for others."""
    if text and text not in DTYPES:
        raise usage_error(f"--dtype must be one of {', '.join(DTYPES)}, got {text!r}")
    if text:
        return text
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def check_picture(option: str, path: Path) -> None:
    """Ends the program with status 2 unless a picture can be written to `path`."""
    from minference_jax.runs.files import check_output_file
    from minference_jax.viz.figure import check_path, has_matplotlib
    from minference_jax.viz.page import NO_PICTURES

    with usage(option):
        check_output_file(check_path(path))
    if not has_matplotlib():
        raise usage_error(f"{option}: {NO_PICTURES}")


def usage_error(message: str) -> typer.BadParameter:
    """An error that ends the program with status 2."""
    return typer.BadParameter(message)


def refuse(ctx: typer.Context, why: str, *parameters: str) -> None:
    """Ends the program with status 2 where one of these parameters was given on the command line, and names its option:
    it would have no effect, and `why` says when."""
    options = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    for name in parameters:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise usage_error(f"{options[name]} has no effect {why}")


@contextlib.contextmanager
def usage(option: str) -> Iterator[None]:
    """`ValueError` and `TypeError` within the block mean that the option was used wrongly: they end with status 2."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise usage_error(f"{option}: {error}") from None


def split_names(option: str, text: str) -> list[str]:
    """Names at the commas, each once. At least one, and none empty, or the command line is wrong."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise usage_error(f"{option} must be names with commas, got {text!r}")
    return list(dict.fromkeys(names))


def command_line() -> str:
    """How the program was called, for the files that it writes."""
    return shlex.join(["minference-jax", *sys.argv[1:]])


def run_facts(model: Path) -> dict[str, Any]:
    """What a report says of its run beside its settings: model, command, date, versions, device."""
    import jax

    from minference_jax.runs.identity import package_version

    return {
        "model": model.absolute().name,
        "command": command_line(),
        "date": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        "versions": {
            "minference-jax": package_version(),
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "device": jax.devices()[0].device_kind,
    }


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
