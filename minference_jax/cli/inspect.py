"""`inspect`: what a checkpoint or a pattern file holds, without loading the weights."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from minference_jax.cli.console import print_json, stdout, usage_error
from minference_jax.cli.pattern_option import format_pattern


def inspect(
    model: Annotated[Path | None, typer.Argument(help="A Hugging Face directory or a .gguf file.")] = None,
    patterns: Annotated[Path | None, typer.Option(help="A pattern file, ours or MInference's.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a checkpoint's config and parameters, and which patterns the heads follow."""
    if model is None and patterns is None:
        raise usage_error("give a model, --patterns FILE, or both")
    from minference_jax.models.config import LlamaConfig
    from minference_jax.models.convert import open_checkpoint
    from minference_jax.pattern_io import load_patterns

    found: dict[str, Any] = {}
    heads = None
    if model is not None:
        files = open_checkpoint(model)
        config = LlamaConfig.from_hf(files.config)
        heads = config.num_heads
        found |= {"format": files.format, "config": dataclasses.asdict(config), "parameters": _parameters(config)}
    if patterns is not None:
        found["patterns"] = _patterns(load_patterns(patterns, heads=heads))
    if json:
        print_json(found)
        return
    for heading, content in found.items():
        stdout().print(_table(heading, content) if isinstance(content, dict) else f"{heading}: {content}")


def _parameters(config: Any) -> dict[str, int]:
    """Numbers in each group, by what they do; the total last."""
    from minference_jax.models.params import param_shapes

    groups = {"embed": "embedding", "lm_head": "head", "w_gate": "MLP", "w_up": "MLP", "w_down": "MLP"}
    sizes: Counter[str] = Counter()
    for name, shape in param_shapes(config).items():
        leaf = name.removeprefix("layers.")
        sizes[groups.get(leaf, "norms" if leaf.endswith("norm") else "attention")] += math.prod(shape)
    return {**sizes, "all": sum(sizes.values())}


def _patterns(patterns: Any) -> dict[str, Any]:
    """How many heads follow each pattern, and the kinds of each layer."""
    counts = Counter(format_pattern(pattern) for layer in patterns for pattern in layer)
    rows: dict[str, Any] = {"layers": patterns.num_layers, "heads per layer": patterns.num_heads}
    rows |= {f"heads {pattern}": count for pattern, count in counts.most_common()}
    for index, layer in enumerate(patterns):
        kinds = Counter(format_pattern(pattern).partition(":")[0] for pattern in layer)
        rows[f"layer {index}"] = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return rows


def _table(heading: str, content: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=heading, box=box.SIMPLE, show_header=False, title_justify="left")
    for name, value in content.items():
        table.add_row(name, f"{value:,}" if type(value) is int else str(value))
    return table
