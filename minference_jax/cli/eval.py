"""`eval`: tasks by methods by lengths, and a report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from minference_jax.cli.console import (
    MAX_BATCH,
    progress,
    read_full_text,
    split_names,
    stderr,
    stdout,
    usage,
    usage_error,
)
from minference_jax.cli.generate import load_model
from minference_jax.cli.mesh import MESH_HELP, check_mesh, start_mesh
from minference_jax.patterns.resolve import resolve_patterns


def evaluate(
    model: Annotated[Path, typer.Option(help="A Hugging Face directory or a .gguf file.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Names or groups (niah, retrieval, ruler), with commas; infinitebench, longbench, ppl, turns."
        ),
    ] = "niah,kv,ppl",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, with commas.")] = "1024,4096",
    methods: Annotated[
        str,
        typer.Option(help="Names (dense, minference, a-shape, static, …), patterns, searched:FILE; with commas."),
    ] = "dense,minference,a-shape",
    samples: Annotated[int, typer.Option(min=1, max=1_000_000, help="Of each task at each length.")] = 50,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Prompts at once.")] = 8,
    density: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of keys that methods may visit.")] = 0.35,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU.")] = "",
    text: Annotated[str, typer.Option(help="Haystack and text for perplexity; default: an excerpt of a novel.")] = "",
    qa: Annotated[list[Path] | None, typer.Option(help="In SQuAD's format: ruler-qa_1; a second: ruler-qa_2.")] = None,
    file: Annotated[list[Path] | None, typer.Option(help="A JSONL file of infinitebench or longbench.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of results and report; a run that was stopped goes on.")] = Path(
        "eval"
    ),
    mesh: Annotated[str, typer.Option(help=MESH_HELP + " Of one host.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Where another process uses --output, wait for it.")] = False,
) -> None:
    """Score methods on tasks at prompt lengths; results are kept, and a stopped run goes on where it was."""
    from minference_jax.checkpoints.convert import open_checkpoint
    from minference_jax.eval.report import tables, write_report
    from minference_jax.eval.runner import evaluate as run
    from minference_jax.eval.tasks import make_tasks
    from minference_jax.models.config import LlamaConfig
    from minference_jax.runs.files import check_output_folder
    from minference_jax.text.tokenizer import load_tokenizer

    shared = start_mesh(mesh)
    sizes = _lengths(lengths)
    names = split_methods(methods)
    with usage("--output"):
        check_output_folder(output)
    # Everything that may be wrong is looked at before the weights are read.
    book = read_full_text(text) if text else None
    with usage("--tasks"):
        chosen = make_tasks(split_names("--tasks", tasks), text=book, qa=qa or (), files=file or ())
    config = LlamaConfig.from_hf(open_checkpoint(model).config)
    check_mesh(shared, config)
    tokenizer = load_tokenizer(model)
    with usage("--methods"):
        compared = [_method(name, config, tokenizer) for name in names]
    network = load_model(model, None, dtype, mesh=shared)
    with progress("Evaluating") as update:
        results = run(
            network,
            tokenizer,
            chosen,
            lengths=sizes,
            methods=compared,
            samples=samples,
            batch=batch,
            density=density,
            seed=seed,
            path=output / "results.jsonl",
            about={"model": model.absolute().name, "text": text, "methods": names},
            wait=wait,
            progress=lambda done, total, _: update(done, total),
        )
    paths = write_report(results, output, f"{model.absolute().name}, {samples} samples of each task and length")
    from rich.table import Table

    for table in tables(results)[: len(sizes)]:
        shown = Table(*table.header, title=table.title)
        for row in table.rows:
            shown.add_row(*(cell.replace("[", "\\[") for cell in row))
        stdout().print(shown)
    stderr().print("Written: " + ", ".join(map(str, paths)))


def _lengths(text: str) -> list[int]:
    from minference_jax.eval.samples import check_length

    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[1-9][0-9]{0,11}\s*", part) for part in parts):
        raise usage_error(f"--lengths must be whole numbers with commas, got {text!r}")
    sizes = list(dict.fromkeys(map(int, parts)))
    with usage("--lengths"):
        for size in sizes:
            check_length(size)
    return sizes


def split_methods(text: str) -> list[str]:
    """Names at the commas, each once, except those between the fields of a pattern."""
    names = [part.strip() for part in re.split(r",(?![a-z_]+=)", text)]
    if not all(names):
        raise usage_error(f"--methods must be names or patterns with commas, got {text!r}")
    return list(dict.fromkeys(names))


def _method(name: str, config: Any, tokenizer: Any) -> Any:
    """A name of `METHODS`, `static`, `searched:<file or preset>`, or a pattern that `resolve_patterns` reads.

    Budgets are brought to the density on the end of the package's text, of which prompts rarely begin.
    """
    from minference_jax.data import load_text
    from minference_jax.eval.methods import ESTIMATED, METHODS, Method, static_from

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
