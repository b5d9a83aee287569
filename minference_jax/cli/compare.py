"""`compare`: our outputs against Hugging Face PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minference_jax.cli.console import read_text, usage_error
from minference_jax.patterns.resolve import resolve_patterns
from minference_jax.patterns.text import PATTERN_HELP


def compare(
    model: Annotated[Path, typer.Option(help="A Hugging Face directory or a .gguf file.")],
    text: Annotated[str, typer.Option(help="A text file; - is standard input. With --task, its haystack.")] = "",
    task: Annotated[str, typer.Option(help="Compare on prompts of this task (see eval) instead of a text.")] = "",
    length: Annotated[int, typer.Option(min=64, help="With --task: tokens of a prompt.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="With --task: how many prompts.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of the text to compare.")] = 2048,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, on both sides.")] = "float32",
    pattern: Annotated[str, typer.Option(help=f"Of our side: {PATTERN_HELP}")] = "dense",
    fp8: Annotated[bool, typer.Option("--fp8", help="Our projections in FP8 (not with --task).")] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Length of the greedy continuations; with --task the task's.")
    ] = 64,
    torch_python: Annotated[
        Path | None, typer.Option(help="The interpreter that has PyTorch.", envvar="MINFERENCE_TORCH_PYTHON")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Compare layers, logits, perplexity and greedy text with PyTorch; status 1 outside the tolerance."""
    if not (text or task):
        raise usage_error("give --text or --task")
    from minference_jax.checkpoints.convert import open_checkpoint
    from minference_jax.compare import run_compare
    from minference_jax.compare.task import run_compare_task
    from minference_jax.models.config import LlamaConfig

    config = LlamaConfig.from_hf(open_checkpoint(model).config)
    patterns = resolve_patterns(pattern, config.num_layers, config.num_heads)
    options = {"as_json": json, "dtype": dtype, "patterns": patterns, "torch_python": torch_python}
    if task:
        haystack = read_text(text) if text else None
        return run_compare_task(model, task, text=haystack, length=length, samples=samples, **options)
    options |= {"fp8_projections": fp8, "max_new_tokens": max_new_tokens}
    return run_compare(model, read_text(text), tokens=tokens, **options)
