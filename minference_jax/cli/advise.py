"""`advise`: whether sparse attention pays for a model on a GPU, with which rule, and what fits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from minference_jax.cli.completion import complete_pattern
from minference_jax.cli.console import MAX_BATCH, print_json, stdout, usage
from minference_jax.cli.lengths import HOW, parse_lengths
from minference_jax.patterns.resolve import resolve_patterns
from minference_jax.patterns.text import PATTERN_HELP


def advise(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory, a .gguf file, or a name such as llama-3-8b.")],
    lengths: Annotated[str, typer.Option(help=f"Prompt lengths in tokens, with commas; {HOW}")] = "8K,32K,128K",
    gpu: Annotated[str, typer.Option(help="H100, H200, A100, A10, L40S, B200, 'RTX 4090' or 'RTX 5090'.")] = "H100",
    pattern: Annotated[
        str,
        typer.Option(help=f"{PATTERN_HELP} auto is a rule by length.", autocompletion=complete_pattern),
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Prompts at once, for what fits.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict whether sparse attention pays on a GPU, with which rule, and what fits there. Nothing is run.

    Example: minference-jax advise llama-3.1-8b --lengths 8K,128K --gpu A100
    """
    from minference_jax.checkpoints.convert import open_checkpoint
    from minference_jax.checkpoints.presets import CONFIGS
    from minference_jax.models.config import LlamaConfig
    from minference_jax.patterns.describe import describe_patterns
    from minference_jax.planning.outlook import MEMORY, outlook, room, source

    sizes = parse_lengths("--lengths", lengths)
    known = model in CONFIGS and not Path(model).exists()
    config = CONFIGS[model] if known else LlamaConfig.from_hf(open_checkpoint(Path(model)).config)
    with usage("--pattern"):
        given = None if pattern == "auto" else resolve_patterns(pattern, config.num_layers, config.num_heads)
        if given is None and pattern != "auto":
            raise ValueError("dense attention is what patterns are compared with")
    gpu = next((name for name in MEMORY if name.lower() == gpu.lower()), gpu)
    with usage("--gpu"):
        rows = [outlook(config, size, gpu, patterns=given, batch=batch) for size in sizes]
    longest = room(config, gpu, patterns=given, batch=batch)
    found: list[dict[str, Any]] = [
        {
            "tokens": row.tokens,
            "pattern": describe_patterns(row.patterns),
            "pays": row.pays,
            "dense_seconds": row.dense_seconds,
            "sparse_seconds": row.sparse_seconds,
            "gain": row.gain,
            "attention_share": row.attention_share,
            "fits": row.fits and {"way": row.fits[0], "GiB": row.fits[1]},
        }
        for row in rows
    ]
    if json:
        about = {"model": model, "gpu": gpu, "rates": source(gpu), "batch": batch}
        print_json({**about, "lengths": found, "longest_prompts": longest})
        return
    print_advice(f"{model} on {gpu}, bfloat16; rates {source(gpu)}", found, longest)
    limit = config.context_length
    if limit is not None and max(sizes) > limit:
        stdout().print(f"The model's own context is {limit:,} tokens: answers past it may be worthless.")


def print_advice(title: str, rows: list[dict[str, Any]], longest: dict[str, int]) -> None:
    """A line or three for each length, and the longest prompts."""
    console = stdout()
    console.print(title, markup=False)
    for row in rows:
        dense, sparse = row["dense_seconds"], row["sparse_seconds"]
        share = f"attention is {row['attention_share']:.0%} of a dense prefill of {dense:.3g} s"
        head = f"\n{row['tokens']:,} tokens: {share}."
        if row["pays"]:
            pays = "Sparse pays" if row["gain"] > 1.05 else "Sparse pays little"
            says = f"{pays}: {sparse:.3g} s, {row['gain']:.2f} times as fast, with {row['pattern']}."
        else:
            says = f"Dense is as fast: sparse would take {sparse:.3g} s with {row['pattern']}."
        fits = row["fits"]
        held = f"Fits with {fits['way']}: {fits['GiB']:.1f} GiB." if fits else "Does not fit, in any way."
        console.print(f"{head}\n  {says}\n  {held}", markup=False)
    console.print("\nLongest prompts:", markup=False)
    for way, tokens in longest.items():
        console.print(f"  {tokens:>9,}  {way}", markup=False)
