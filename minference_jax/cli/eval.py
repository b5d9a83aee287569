"""`eval`: tasks by methods by lengths, and a report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from minference_jax.cli.completion import complete_dtype, complete_methods, complete_tasks
from minference_jax.cli.console import (
    MAX_BATCH,
    chosen_dtype,
    read_full_text,
    refuse,
    run_facts,
    split_names,
    stderr,
    stdout,
    usage,
    usage_error,
)
from minference_jax.cli.eval_list import print_list
from minference_jax.cli.generate import load_model
from minference_jax.cli.lengths import HOW, length_option, parse_lengths
from minference_jax.cli.mesh import MESH_HELP, check_mesh, start_mesh
from minference_jax.cli.progress import progress
from minference_jax.patterns.resolve import resolve_patterns


def evaluate(
    ctx: typer.Context,
    model: Annotated[Path | None, typer.Option(help="A Hugging Face directory or a .gguf file.")] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Names or groups, with commas; see --list. Default: niah,kv,ppl, or --data alone.",
            autocompletion=complete_tasks,
        ),
    ] = "",
    lengths: Annotated[str, typer.Option(help=f"Prompt lengths in tokens, with commas; {HOW}")] = "1K,4K",
    methods: Annotated[
        str,
        typer.Option(
            help="Names (dense, minference, a-shape, static, …), patterns, searched:FILE; with commas.",
            autocompletion=complete_methods,
        ),
    ] = "dense,minference,a-shape",
    data: Annotated[Path | None, typer.Option(help="Rows of your own: .jsonl, .csv, .tsv or lines of text.")] = None,
    template: Annotated[str, typer.Option(help="With --data: the prompt, with fields as {text}.")] = "",
    answer: Annotated[str, typer.Option(help="With --data: the field with the right answer or a list of them.")] = "",
    metric: Annotated[
        str, typer.Option(help="With --data: exact, f1, rouge-l, contains, or accuracy over --choices.")
    ] = "exact",
    choices: Annotated[str, typer.Option(help="With --data: labels with commas, or the field that lists them.")] = "",
    max_new_tokens: Annotated[int, length_option(help="With --data: of a reply, at most.")] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="With --data: no chat template.")] = False,
    samples: Annotated[int, typer.Option(min=1, max=1_000_000, help="Of each task at each length.")] = 50,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Prompts at once.")] = 8,
    density: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of keys that methods may visit.")] = 0.35,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU.", autocompletion=complete_dtype),
    ] = "",
    text: Annotated[str, typer.Option(help="Haystack and text for perplexity; default: an excerpt of a novel.")] = "",
    qa: Annotated[list[Path] | None, typer.Option(help="In SQuAD's format: ruler-qa_1; a second: ruler-qa_2.")] = None,
    file: Annotated[list[Path] | None, typer.Option(help="A JSONL file of infinitebench or longbench.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of results and report; a run that was stopped goes on.")] = Path(
        "eval"
    ),
    mesh: Annotated[str, typer.Option(help=MESH_HELP + " Of one host.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Where another process uses --output, wait for it.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Print tasks, methods and presets.")] = False,
) -> None:
    """Score methods on tasks at prompt lengths; results are kept, and a stopped run goes on where it was.

    Example: minference-jax eval --model DIR --tasks niah,ppl --lengths 1K,4K --methods dense,minference

    Example: minference-jax eval --model DIR --data mine.jsonl --template "{text} Positive or negative?" --answer label
    --metric accuracy --choices positive,negative --lengths 2K
    """
    if list_:
        print_list()
        return
    if model is None:
        raise usage_error("give --model, or --list")
    from minference_jax.checkpoints.convert import open_checkpoint
    from minference_jax.eval.own_data import read_own_data
    from minference_jax.eval.report import write_report
    from minference_jax.eval.results import check_result_file, read_run
    from minference_jax.eval.runner import evaluate as run
    from minference_jax.eval.runner import run_settings
    from minference_jax.eval.tables import tables
    from minference_jax.eval.tasks import make_tasks
    from minference_jax.models.config import LlamaConfig
    from minference_jax.runs.files import check_output_folder
    from minference_jax.text.tokenizer import load_tokenizer
    from minference_jax.viz.figure import has_matplotlib
    from minference_jax.viz.page import NO_PICTURES

    shared = start_mesh(mesh)
    dtype = chosen_dtype(dtype)
    sizes = parse_lengths("--lengths", lengths)
    names = split_methods(methods)
    if not any(map(_has_budget, names)):
        refuse(ctx, f"with --methods {methods}", "density")
    with usage("--output"):
        check_output_folder(output)
    # Everything that may be wrong is looked at before the weights are read: arguments, files, what needs the tokenizer.
    chosen: list[Any] = []
    if data is None:
        refuse(ctx, "without --data", "template", "answer", "metric", "choices", "max_new_tokens", "raw")
    else:
        if not (template and answer):
            raise usage_error("--data needs --template and --answer")
        if choices:
            refuse(ctx, "with --choices", "max_new_tokens")
        if not tasks:
            refuse(ctx, "with --data and no --tasks", "text", "qa", "file", "seed")
        labels = split_names("--choices", choices) if choices else ()
        options = {"choices": labels, "max_new_tokens": max_new_tokens, "chat": not raw}
        with usage("--data"):
            chosen.append(read_own_data(data, template, answer, metric, **options))
    book = read_full_text(text) if text else None
    if tasks or not chosen:
        with usage("--tasks"):
            wanted = split_names("--tasks", tasks or "niah,kv,ppl")
            chosen += make_tasks(wanted, text=book, qa=qa or (), files=file or ())
    config = LlamaConfig.from_hf(open_checkpoint(model).config)
    check_mesh(shared, config)
    tokenizer = load_tokenizer(model)
    with usage("--methods"):
        compared = [_method(name, config, tokenizer, max(sizes), shared) for name in names]
    settings = {"lengths": sizes, "samples": samples, "batch": batch, "density": density, "seed": seed}
    with usage("settings"):
        known = run_settings(tokenizer, chosen, compared, **settings)
    with usage("--output"):
        check_result_file(output / "results.jsonl", known)
    network = load_model(model, None, dtype, mesh=shared)
    with progress("Evaluating", keeps=str(output / "results.jsonl"), unit="results") as update:
        results = run(
            network,
            tokenizer,
            chosen,
            methods=compared,
            **settings,
            path=output / "results.jsonl",
            about={"text": text, "qa": list(map(str, qa or ())), **run_facts(model)},
            wait=wait,
            progress=lambda done, total, _: update(done, total),
        )
    title = f"{model.absolute().name}, {samples} samples of each task and length"
    paths = write_report(results, output, title, read_run(output / "results.jsonl"))
    from rich.table import Table

    for table in tables(results)[: len(sizes)]:
        shown = Table(*table.header, title=table.title)
        for row in table.rows:
            shown.add_row(*(cell.replace("[", "\\[") for cell in row))
        stdout().print(shown)
    if not has_matplotlib():
        stderr().print(NO_PICTURES, markup=False)
    stderr().print("Written: " + ", ".join(map(str, paths)), markup=False)


def split_methods(text: str) -> list[str]:
    """Names at the commas, each once, except those between the fields of a pattern."""
    names = [part.strip() for part in re.split(r",(?![a-z_]+=)", text)]
    if not all(names):
        raise usage_error(f"--methods must be names or patterns with commas, got {text!r}")
    return list(dict.fromkeys(names))


def _has_budget(name: str) -> bool:
    """Whether `--density` says how much a method visits: not of dense attention, nor of a pattern of its own."""
    from minference_jax.eval.methods import METHODS

    return name != "dense" and (name in METHODS or name == "static" or name.startswith("searched:"))


def _method(name: str, config: Any, tokenizer: Any, longest: int, mesh: Any) -> Any:
    """A name of `METHODS`, `static`, `searched:<file or preset>`, or a pattern that `resolve_patterns` reads.

    Budgets are brought to the density on the end of the package's text, of which prompts rarely begin. Raises
    `ValueError` for one that prompts of up to `longest` tokens, or a model on this mesh, cannot have.
    """
    from minference_jax.data import load_text
    from minference_jax.eval.methods import BUILT, ESTIMATED, METHODS, Method, static_from
    from minference_jax.models.capture import check_capture

    if name == "static" or name in ESTIMATED or name.startswith("searched:"):
        try:
            check_capture(config, longest, mesh)
        except ValueError as error:
            raise ValueError(f"{name} reads a prompt layer by layer: {error}") from None
    if name in BUILT and mesh is not None and mesh.shape["heads"] > 1:
        raise ValueError(f"{name} sees all heads of a layer, which the mesh divides; use heads=1")

    def other() -> list[int]:
        return tokenizer.encode(load_text())[-32768:]

    if name == "static":
        return Method(name, static_from(other()))
    if name in METHODS:
        return Method.measured(name, METHODS[name], other()) if name in ESTIMATED else Method(name, METHODS[name])
    if name.startswith("searched:"):
        patterns = resolve_patterns(name.removeprefix("searched:"), config.num_layers, config.num_heads)
        if patterns is None:
            raise ValueError(f"{name}: dense attention has no budgets to scale")
        return Method.measured(name, patterns, other())
    return Method.fixed(name, resolve_patterns(name, config.num_layers, config.num_heads))
