"""`batch`: one reply for each row of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minference_jax.cli.completion import complete_dtype, complete_pattern
from minference_jax.cli.console import (
    MAX_BATCH,
    chosen_dtype,
    read_full_text,
    refuse,
    split_names,
    stderr,
    stdout,
    usage,
    usage_error,
)
from minference_jax.cli.generate import check_model, load_model
from minference_jax.cli.lengths import length_option
from minference_jax.cli.progress import progress
from minference_jax.patterns.text import PATTERN_HELP


def batch(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="Rows: .jsonl, .csv, .tsv, or lines of text.")],
    prompt: Annotated[str, typer.Option(help="What is asked of each row: {text} is its field text; {{ is a brace.")],
    out: Annotated[Path, typer.Option(help="JSONL, a line for each row; a job that was stopped goes on.")],
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face directory or a .gguf file; default: the demo's model.")
    ] = None,
    choices: Annotated[str, typer.Option(help="Labels with commas: the reply is one, each with its probability.")] = "",
    json_schema: Annotated[
        Path | None, typer.Option(help="A file with a JSON schema: replies are JSON that fits it.")
    ] = None,
    before: Annotated[
        str, typer.Option(help="A file whose text is put before each prompt, and processed once: one text, many rows.")
    ] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    raw: Annotated[bool, typer.Option(help="Continue the prompt itself, without the chat template.")] = False,
    max_new_tokens: Annotated[int, length_option(help="Of a reply, at most.")] = 256,
    batch: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_BATCH, help="Prompts at once; default: up to 8 on a CPU, 64 on a GPU."),
    ] = None,
    pattern: Annotated[
        str,
        typer.Option(
            help=f"How heads attend in prefill: {PATTERN_HELP} auto is sparse where that pays.",
            autocompletion=complete_pattern,
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU.", autocompletion=complete_dtype),
    ] = "",
    fp8: Annotated[bool, typer.Option("--fp8", help="Projections in FP8: faster on Hopper GPUs.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Where another process uses --out, wait for it.")] = False,
) -> None:
    """Ask the same of every row of a file. Killed at any time, the same command goes on where it was.

    Example: minference-jax batch reviews.csv --prompt "Is this positive or negative? {text}" --choices
    positive,negative --out replies.jsonl
    """
    from minference_jax.jobs import PromptTemplate, read_rows
    from minference_jax.jobs.batch import BatchJob
    from minference_jax.jobs.choices import choice_ids
    from minference_jax.jobs.json_schema import JsonSchema
    from minference_jax.jobs.output import check_job_file
    from minference_jax.runs.files import strict_json
    from minference_jax.text.tokenizer import load_tokenizer

    # Everything that may be wrong is looked at before the weights are read: arguments, files, what needs the tokenizer.
    dtype = chosen_dtype(dtype)
    labels = split_names("--choices", choices) if choices else []
    if labels:
        refuse(ctx, "with --choices", "max_new_tokens", "json_schema")
    if raw:
        refuse(ctx, "with --raw", "system")
    with usage("--out"):
        check_job_file(out)
    rows = read_rows(file)
    schema = None
    if json_schema is not None:
        with usage(f"--json-schema: {json_schema}"):
            schema = strict_json(read_full_text(str(json_schema)))
    text = read_full_text(before).replace("{", "{{").replace("}", "}}") + "\n\n" if before else ""
    with usage("--prompt"):
        template = PromptTemplate(text + prompt)
        template.check(rows)
    model = model_or_demo(model)
    config, patterns = check_model(model, pattern)
    tokenizer = load_tokenizer(model)
    if labels:
        with usage("--choices"):
            choice_ids(tokenizer, labels)
    if json_schema is not None:  # what the file holds may be null, which is no schema
        with usage("--json-schema"):
            JsonSchema(schema, tokenizer, config.vocab_size)
    settings = {"choices": labels, "json_schema": schema, "max_new_tokens": max_new_tokens, "batch": batch}
    job = BatchJob.of(config, tokenizer, rows, template, system=system, raw=raw, **settings)
    with usage("--out"):
        check_job_file(out, job.settings())
    network = load_model(model, patterns, dtype, fp8)
    with progress("Replying to rows", keeps=str(out), unit="rows") as update:
        replies = job.run(network, tokenizer, out=out, wait=wait, progress=update)
    for label in labels:
        count = sum(reply.reply == label for reply in replies)
        stdout().print(f"{label}: {count:,} of {len(replies):,}", markup=False)
    cut = sum(not reply.finished for reply in replies)
    if cut:
        stderr().print(f"{cut:,} replies were cut at {max_new_tokens} tokens")
    stderr().print(f"Written: {out}", markup=False)


def model_or_demo(model: Path | None) -> Path:
    """The model that was named, or the demo's. Ends with status 2 where neither is there."""
    from minference_jax.cli.fetch import default_model

    if model is not None:
        return model
    if not default_model().is_dir():
        raise usage_error("--model: name a model, or fetch the demo's with `minference-jax fetch-demo-model`")
    return default_model()
