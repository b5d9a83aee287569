"""`demo`: the demonstration of `minference_jax.demo`, printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minference_jax.cli.console import print_json, stderr, stdout
from minference_jax.cli.fetch import default_model, fetch
from minference_jax.cli.lengths import length_option
from minference_jax.cli.progress import progress


def demo(
    model: Annotated[Path | None, typer.Option(help="A chat model; default: SmolLM2-135M-Instruct, fetched.")] = None,
    tokens: Annotated[int, length_option(least=512, help="Length of the prompt.")] = 4096,
    depth: Annotated[float, typer.Option(min=0.0, max=1.0, help="Where in the chapter the fact is hidden.")] = 0.35,
    seed: Annotated[int, typer.Option(help="Which fact is hidden.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Read book chapters with dense and with sparse prefill, and answer a question about them.

    Example: minference-jax demo --tokens 4K
    """
    directory = model or fetch(default_model())
    from minference_jax.demo import report, run_demo

    with progress("Reading") as update:
        result = run_demo(
            directory,
            tokens=tokens,
            depth=depth,
            seed=seed,
            progress=update,
            say=lambda line: stderr().print(line, soft_wrap=True),
        )
    if json:
        print_json(result.to_dict())
    else:
        stdout().print(report(result))
    return 0 if result.same_right_answer else 1
