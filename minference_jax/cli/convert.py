"""`convert`: any checkpoint we read, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minference_jax.cli.completion import complete_dtype
from minference_jax.cli.console import chosen_dtype, stdout, usage
from minference_jax.cli.progress import progress


def convert(
    source: Annotated[Path, typer.Argument(help="A Hugging Face directory or a .gguf file.")],
    directory: Annotated[Path, typer.Argument(help="Is made; must not hold anything yet.")],
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16.", autocompletion=complete_dtype)
    ] = "bfloat16",
) -> None:
    """Write a checkpoint as a Hugging Face directory with safetensors, which transformers loads too.

    Example: minference-jax convert model.gguf DIR --dtype bfloat16
    """
    from minference_jax.checkpoints.convert import load_checkpoint
    from minference_jax.checkpoints.save import new_directory, write_checkpoint
    from minference_jax.runs.files import check_output_folder

    dtype = chosen_dtype(dtype)
    with usage("DIRECTORY"):
        check_output_folder(directory)
    with new_directory(directory) as scratch:  # before the weights are read
        with progress("Reading weights") as update:
            config, params = load_checkpoint(source, dtype=dtype, progress=update)
        with progress("Writing"):
            write_checkpoint(config, params, scratch, tokenizer_from=source)
    stdout().print(f"{directory}: {sum(p.size for p in params.values()):,} parameters in {dtype}")
