"""`summarize`: what a file's rows say about some keywords. `make-reviews`: a file to try it on."""

from __future__ import annotations

import dataclasses
import json as json_text
from pathlib import Path
from typing import Annotated

import typer

from minference_jax.cli.batch import model_or_demo
from minference_jax.cli.completion import complete_dtype, complete_pattern
from minference_jax.cli.console import chosen_dtype, print_json, refuse, split_names, stderr, stdout, usage
from minference_jax.cli.generate import check_model, load_model
from minference_jax.cli.lengths import length_option
from minference_jax.cli.progress import progress
from minference_jax.patterns.text import PATTERN_HELP


def summarize(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="Rows: .jsonl, .csv, .tsv, or lines of text.")],
    keywords: Annotated[str, typer.Option(help="What to look for, with commas.")],
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face directory or a .gguf file; default: the demo's model.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSONL of all replies; a run that was stopped goes on from it.")
    ] = None,
    context: Annotated[
        int | None, length_option(least=64, help="Tokens read at once; default: the model's context.")
    ] = None,
    max_new_tokens: Annotated[int, length_option(help="Of each reply.")] = 96,
    raw: Annotated[bool, typer.Option(help="No chat template.")] = False,
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
    wait: Annotated[bool, typer.Option("--wait", help="Where another process uses --out, wait for it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What the rows of a file say about keywords: counts by the program, sentences by the model, rows as evidence.

    Example: minference-jax summarize reviews.jsonl --keywords quality,price,service
    """
    from minference_jax.jobs import read_rows
    from minference_jax.jobs.output import check_job_file
    from minference_jax.jobs.summarize import SummaryJob
    from minference_jax.text.tokenizer import load_tokenizer

    dtype = chosen_dtype(dtype)
    names = split_names("--keywords", keywords)
    if out is None:
        refuse(ctx, "without --out", "wait")
    else:
        with usage("--out"):
            check_job_file(out)
    rows = read_rows(file)
    model = model_or_demo(model)
    config, patterns = check_model(model, pattern)
    tokenizer = load_tokenizer(model)
    with usage("settings"):
        job = SummaryJob.of(config, tokenizer, rows, names, context, max_new_tokens=max_new_tokens, raw=raw)
    if out is not None:
        with usage("--out"):
            check_job_file(out, job.settings())
    network = load_model(model, patterns, dtype)
    with progress("Reading", keeps=str(out or ""), unit="replies") as update:
        found = job.run(network, tokenizer, out=out, wait=wait, progress=update)
    if json:
        print_json(dataclasses.asdict(found))
        return
    stdout().print(f"{found.rows:,} rows, read in {found.parts:,} parts", markup=False)
    for one in found.findings:
        cited = ", ".join(f"[{row}]" for row in one.citations[:10])
        line = f"{one.keyword}: {one.mentions:,} mentions in {len(one.rows):,} rows. {one.summary} {cited}"
        stdout().print(line.rstrip(), markup=False)


def make_reviews(
    out: Annotated[Path, typer.Argument(help="A .jsonl file to write.")],
    count: Annotated[int, typer.Option(min=1, max=10_000_000)] = 2_000,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write made-up customer reviews in English and Korean, each with its label and what it is about.

    Example: minference-jax make-reviews reviews.jsonl --count 200
    """
    from minference_jax.data.reviews import make_reviews as make
    from minference_jax.runs.files import check_output_file, naming

    with usage("OUT"):
        check_output_file(out)
    lines = [json_text.dumps(row, ensure_ascii=False) + "\n" for row in make(count, seed)]
    with naming(out):
        out.write_text("".join(lines), encoding="utf-8")
    stderr().print(f"Written: {out}", markup=False)
