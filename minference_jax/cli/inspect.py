"""`inspect`: what a checkpoint or a pattern file holds, without loading the weights."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from minference_jax.cli.console import check_picture, print_json, read_full_text, refuse, stdout, usage, usage_error
from minference_jax.cli.lengths import length_option
from minference_jax.patterns.text import format_pattern


def inspect(
    ctx: typer.Context,
    model: Annotated[Path | None, typer.Argument(help="A Hugging Face directory or a .gguf file.")] = None,
    patterns: Annotated[Path | None, typer.Option(help="A pattern file, ours or MInference's.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the patterns, or --head, to a .png, .pdf or .svg.")] = None,
    head: Annotated[
        str, typer.Option(help="LAYER.HEAD: draw its attention on --text, its plan, and what is lost.")
    ] = "",
    text: Annotated[str, typer.Option(help="The text for --head; - is standard input.")] = "",
    tokens: Annotated[int, length_option(least=128, help="How many tokens of the text.")] = 2048,
    memory: Annotated[
        bool, typer.Option("--memory", help="The longest prompt on each GPU; MODEL may be a name such as llama-3-8b.")
    ] = False,
    mesh: Annotated[str, typer.Option(help="With --memory: on so many devices, rows=2,heads=8 or heads=8.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a checkpoint's config and parameters, and which patterns the heads follow; draw pictures of them.

    Example: minference-jax inspect DIR --patterns patterns.json --plot patterns.png
    """
    if model is None and patterns is None:
        raise usage_error("give a model, --patterns FILE, or both")
    if plot is not None and patterns is None:
        raise usage_error("--plot needs --patterns FILE")
    if head and (plot is None or model is None or not text):
        raise usage_error("--head needs a model, --patterns, --text and --plot")
    if not head:
        refuse(ctx, "without --head", "text", "tokens")
    if plot is not None:
        check_picture("--plot", plot)
    from minference_jax.checkpoints.convert import open_checkpoint
    from minference_jax.models.config import LlamaConfig
    from minference_jax.patterns.files import load_patterns

    found: dict[str, Any] = {}
    heads = layers = None
    if memory and model is None:
        raise usage_error("--memory needs a model")
    if mesh and not memory:
        raise usage_error("--mesh needs --memory")
    if model is not None:
        from minference_jax.checkpoints.presets import CONFIGS

        if str(model) in CONFIGS and not model.exists():
            config = CONFIGS[str(model)]
        else:
            files = open_checkpoint(model)
            found["format"] = files.format
            config = LlamaConfig.from_hf(files.config)
        heads, layers = config.num_heads, config.num_layers
        if memory:
            where = f" on {mesh}" if mesh else ""
            found = {f"longest prompt in tokens, by GPU, of {model}{where}": _memory(config, mesh)}
        else:
            found |= {
                "config": dataclasses.asdict(config) if json else _readable(config),
                "parameters": _parameters(config),
            }
    if patterns is not None:
        loaded = load_patterns(patterns, heads=heads, layers=layers)
        found["patterns"] = _patterns(loaded)
        if plot is not None:
            if head:
                assert model is not None  # checked above
                found["head"] = _plot_head(model, loaded, head, text, tokens, plot)
            else:
                from minference_jax.viz import plot_patterns

                plot_patterns(loaded, plot, title=patterns.name)
            found["plot"] = str(plot)
    if json:
        print_json(found)
        return
    console = stdout()
    for heading, content in found.items():
        console.print(_table(heading, content) if isinstance(content, dict) else f"{heading}: {content}")


def _readable(config: Any) -> dict[str, Any]:
    """The fields of a config, one a line: of nested ones what is not the default, of layers how many are of a kind."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "layer_kinds":
            value = "; ".join(f"{count} layers: {_changes(kind)}" for kind, count in Counter(value).most_common())
        elif dataclasses.is_dataclass(value):
            value = _changes(value)
        if value not in (None, "", ()):
            found[field.name] = value
    return found


def _changes(value: Any) -> str:
    """The fields of a dataclass that are not its defaults."""
    pairs = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
    changed = [
        f"{field.name} ({_changes(x)})" if dataclasses.is_dataclass(x) else f"{field.name} {x}"
        for field, x in pairs
        if x != field.default
    ]
    return ", ".join(changed) or "plain"


def _parameters(config: Any) -> dict[str, int]:
    """Numbers in each group, by what they do; the total last."""
    from minference_jax.models.params import param_shapes

    groups = {"embed": "embedding", "lm_head": "head"}
    groups |= dict.fromkeys(("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down"), "MLP")
    sizes: Counter[str] = Counter()
    for name, shape in param_shapes(config).items():
        leaf = name.removeprefix("layers.")
        of_experts = re.search("expert|router|shared_|choice_bias", leaf)
        kind = "norms" if leaf.endswith("norm") else "experts" if of_experts else "attention"
        sizes[groups.get(leaf, kind)] += math.prod(shape)
    return {**sizes, "all": sum(sizes.values())}


def _memory(config: Any, mesh: str) -> dict[str, dict[str, int]]:
    """The most tokens of a prompt, for each way to run it, on each GPU or a mesh of them. bfloat16, one sequence."""
    from minference_jax.parallel.mesh import abstract_mesh
    from minference_jax.planning.memory import GPUS, USABLE, WAYS, longest_prompt

    with usage("--mesh"):
        shared = abstract_mesh(mesh, config) if mesh else None
    available = {name: USABLE * size * 2**30 for name, size in GPUS.items()}
    return {
        way: {gpu: longest_prompt(config, memory, mesh=shared, **options) for gpu, memory in available.items()}
        for way, options in WAYS.items()
    }


def _patterns(patterns: Any) -> dict[str, Any]:
    """How many heads follow each pattern, and the kinds of each layer."""
    counts = Counter(format_pattern(pattern) for layer in patterns for pattern in layer)
    rows: dict[str, Any] = {"layers": patterns.num_layers, "heads per layer": patterns.num_heads}
    rows |= {f"heads {pattern}": count for pattern, count in counts.most_common()}
    for index, layer in enumerate(patterns):
        kinds = Counter(format_pattern(pattern).partition(":")[0] for pattern in layer)
        rows[f"layer {index}"] = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return rows


def _plot_head(model: Path, patterns: Any, head: str, text: str, tokens: int, plot: Path) -> dict[str, Any]:
    """Draws one head on the first tokens of a text; its figures."""
    import jax
    import jax.numpy as jnp

    from minference_jax.models.capture import capture_qkv
    from minference_jax.models.llama import Llama
    from minference_jax.text.tokenizer import load_tokenizer
    from minference_jax.viz import head_picture, plot_head

    numbers = head.split(".")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise usage_error(f"--head is LAYER.HEAD, such as 3.0, got {head!r}")
    layer, number = map(int, numbers)
    if layer >= patterns.num_layers or number >= patterns.num_heads:
        raise ValueError(f"--head {head}: there are {patterns.num_layers} layers of {patterns.num_heads} heads")
    ids = load_tokenizer(model).encode(read_full_text(text))[:tokens]
    network = Llama.from_pretrained(model, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    stream = capture_qkv(network, jnp.asarray([ids], jnp.int32))
    q, k, _ = next(itertools.islice(stream, layer, None))
    pattern = patterns.layer(layer)[number]
    picture = head_picture(q, k, pattern, number)
    name = f"layer {layer}, head {number}: {format_pattern(pattern)}, {len(ids):,} tokens"
    plot_head(picture, plot, title=name)
    return {"head": name, "density": picture.density, "recall": picture.recall}


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries within as rows of their own, such as `rope.theta`; what is None or empty is left out."""
    rows: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            rows |= {f"{name}.{key}": one for key, one in _flat(value).items()}
        elif value is not None and value != ():
            rows[name] = value
    return rows


def _table(heading: str, content: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    if not all(isinstance(value, dict) for value in content.values()):
        content = _flat(content)
    rows = [value if isinstance(value, dict) else {"": value} for value in content.values()]
    columns = list(rows[0]) if rows else []
    table = Table(title=heading, box=box.SIMPLE, show_header=columns != [""], title_justify="left")
    table.add_column("", overflow="fold")
    for column in columns:  # numbers stay whole, and the names before them are folded
        table.add_column(column, overflow="fold", no_wrap=bool(column))
    for name, row in zip(content, rows, strict=True):
        table.add_row(name, *(f"{value:,}" if type(value) is int else str(value) for value in row.values()))
    return table
