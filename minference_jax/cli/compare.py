"""`compare`: our outputs against Hugging Face PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from minference_jax.cli.completion import complete_dtype, complete_pattern
from minference_jax.cli.console import chosen_dtype, read_full_text, refuse, run_facts, stderr, usage, usage_error
from minference_jax.cli.lengths import length_option
from minference_jax.patterns.resolve import resolve_patterns
from minference_jax.patterns.text import PATTERN_HELP


def compare(
    ctx: typer.Context,
    model: Annotated[Path, typer.Option(help="A Hugging Face directory or a .gguf file.")],
    text: Annotated[str, typer.Option(help="A text file; - is standard input. With --task, its haystack.")] = "",
    task: Annotated[str, typer.Option(help="Compare on prompts of this task (see eval) instead of a text.")] = "",
    length: Annotated[
        int | None, length_option(least=64, help="With --task: tokens of a prompt; 1024 by default.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="With --task: how many prompts; 8 by default.")
    ] = None,
    tokens: Annotated[
        int | None, length_option(least=2, help="How many tokens of the text to compare; 2048 by default.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16, on both sides.", autocompletion=complete_dtype)
    ] = "float32",
    pattern: Annotated[
        str, typer.Option(help=f"Of our side: {PATTERN_HELP}", autocompletion=complete_pattern)
    ] = "dense",
    fp8: Annotated[bool, typer.Option("--fp8", help="Our projections in FP8 (not with --task).")] = False,
    max_new_tokens: Annotated[
        int | None,
        length_option(least=0, help="Length of the greedy continuations; 64, and with --task the task's."),
    ] = None,
    torch_python: Annotated[
        Path | None, typer.Option(help="The interpreter that has PyTorch.", envvar="MINFERENCE_TORCH_PYTHON")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page about it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Compare layers, logits, perplexity and greedy text with PyTorch; status 1 outside the tolerance.

    Example: minference-jax compare --model DIR --text book.txt --tokens 2K --pattern auto
    """
    if not (text or task):
        raise usage_error("give --text or --task")
    dtype = chosen_dtype(dtype)
    if task:
        refuse(ctx, "with --task", "tokens", "max_new_tokens", "fp8")
    else:
        refuse(ctx, "without --task", "length", "samples")
    from minference_jax.checkpoints.convert import open_checkpoint
    from minference_jax.compare import run_compare
    from minference_jax.compare.page import comparison_page
    from minference_jax.compare.task import run_compare_task
    from minference_jax.eval.samples import check_length
    from minference_jax.eval.tasks import make_tasks
    from minference_jax.models.config import LlamaConfig
    from minference_jax.runs.files import check_output_file, naming

    if report is not None:
        with usage("--report"):
            check_output_file(report)
    words = read_full_text(text) if text else None
    config = LlamaConfig.from_hf(open_checkpoint(model).config)
    with usage("--pattern"):
        patterns = resolve_patterns(pattern, config.num_layers, config.num_heads)

    def page(comparison: Any, **more: Any) -> None:  # at the end: JAX must not begin before PyTorch has ended
        assert report is not None
        with naming(report):
            report.write_text(comparison_page(comparison, run_facts(model), **more), encoding="utf-8")
        stderr().print(f"Written: {report}", markup=False)

    options: dict[str, Any] = {
        "as_json": json,
        "page": page if report else None,
        "dtype": dtype,
        "patterns": patterns,
        "torch_python": torch_python,
    }
    if task:
        with usage("--length"):
            check_length(length or 1024)
        with usage("--task"):
            make_tasks([task], text=words)
        return run_compare_task(model, task, text=words, length=length or 1024, samples=samples or 8, **options)
    assert words is not None
    options |= {"fp8_projections": fp8, "max_new_tokens": 64 if max_new_tokens is None else max_new_tokens}
    return run_compare(model, words, tokens=tokens or 2048, **options)
