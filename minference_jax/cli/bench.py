"""`bench`: measurements on this machine, one sub-command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from minference_jax.bench.cases import Case
from minference_jax.cli.completion import complete_dtype, complete_pattern
from minference_jax.cli.console import (
    MAX_BATCH,
    check_picture,
    chosen_dtype,
    print_json,
    read_full_text,
    read_rows,
    refuse,
    show_table,
    stderr,
    stdout,
    usage,
    usage_error,
)
from minference_jax.cli.lengths import parse_length, parse_lengths
from minference_jax.cli.mesh import HOSTS_HELP, MESH_HELP, check_mesh, start_mesh
from minference_jax.cli.tradeoff import tradeoff
from minference_jax.patterns.resolve import resolve_patterns
from minference_jax.patterns.text import PATTERN_HELP, is_pattern_text, parse_pattern
from pallas_kernels.backends import find_backend

app = typer.Typer(help="Measure speed and memory on this machine.", no_args_is_help=True)


MEASURED = (
    *("lengths", "methods", "pattern", "dtype", "repeats", "dense_limit"),
    *("pieces", "mesh", "hosts", "jobs"),
)
"""Parameters of `prefill` that say what is measured."""


@app.command()
def prefill(
    ctx: typer.Context,
    model: Annotated[Path | None, typer.Argument(help="A Hugging Face directory or a .gguf file.")] = None,
    random_weights: Annotated[
        str, typer.Option(help="Instead of a model: a config.json, or llama-3-8b, llama-3.1-8b, qwen2-7b, smollm2.")
    ] = "",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens; K and M count 1,024 and its square.")] = "8K",
    methods: Annotated[
        str, typer.Option(help="Any of dense, a-shape, minference, minference-fp8, auto, auto-fp8.")
    ] = "dense,a-shape,minference",
    pattern: Annotated[
        str, typer.Option(help=f"What minference means: {PATTERN_HELP}", autocompletion=complete_pattern)
    ] = "",
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU.", autocompletion=complete_dtype),
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="Runs, of which the median is shown.")] = 3,
    dense_limit: Annotated[
        str, typer.Option(help="Beyond this length dense rows are estimated from one layer, and marked ~.")
    ] = "128K",
    pieces: Annotated[bool, typer.Option(help="Also time attention, index and projections by themselves.")] = True,
    mesh: Annotated[
        str, typer.Option(help=f"{MESH_HELP} Then no pieces are timed, and dense rows beyond the limit are left out.")
    ] = "",
    hosts: Annotated[str, typer.Option(help=HOSTS_HELP)] = "",
    jobs: Annotated[
        int, typer.Option(min=1, max=1_000, help="Compile so many programs at a time, all before the first run.")
    ] = 1,
    rows_of: Annotated[
        Path | None,
        typer.Option("--rows", exists=True, dir_okay=False, help="Measure nothing: show what --json printed before."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write latency and speed-up as an image (needs matplotlib).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time prefill: lengths times methods, with the share of attention, index and projections.

    Compiled programs are kept between runs, in the user's cache or where JAX_COMPILATION_CACHE_DIR says: the compile
    column says which ones came from there, and what tracing and loading them took.

    Example: minference-jax bench prefill --random-weights llama-3-8b --lengths 8K,128K
    """
    if [model is not None, bool(random_weights), rows_of is not None].count(True) != 1:
        raise usage_error("give a model, --random-weights or --rows")
    from minference_jax.bench import prefill as bench

    if plot is not None:
        check_picture("--plot", plot)
    if rows_of is not None:
        refuse(ctx, "with --rows, which measure nothing", *MEASURED)
        before = read_rows(rows_of)
        if json:
            print_json(before)
        else:
            show_table(bench.table(bench.from_json(before), before["environment"]))
        if plot is not None:
            bench.plot(bench.from_json(before), plot, title=before.get("model", ""))
        return
    chosen = _methods(methods)
    sizes = parse_lengths("--lengths", lengths)
    limit = parse_length(dense_limit)
    if not any(name.startswith("minference") for name in chosen):
        refuse(ctx, "without minference among --methods", "pattern")
    if mesh and pieces:
        refuse(ctx, "with --mesh", "pieces")
    dtype = dtype and chosen_dtype(dtype)  # without one the device decides, which hosts agree on first
    if is_pattern_text(pattern):
        with usage("--pattern"):
            parse_pattern(pattern)
    config = _config(model, random_weights)
    if pattern:
        with usage("--pattern"):
            mine = resolve_patterns(pattern, config.num_layers, config.num_heads)
        chosen = {name: (mine if name.startswith("minference") else p, fp8) for name, (p, fp8) in chosen.items()}
    shared = start_mesh(mesh, hosts)
    network = _network(model, config, chosen_dtype(dtype), shared)
    rows, name = [], random_weights or str(model)
    try:
        for row in bench.bench_prefill(
            network,
            sizes,
            chosen,
            repeats=repeats,
            dense_limit=limit,
            pieces=pieces,
            jobs=jobs,
            say=lambda line: stderr().print(line),
        ):
            rows.append(row)
            seconds = f"{row.seconds:.3g} s{' (estimated)' if row.estimated else ''}"
            how = "loaded from the compile cache" if row.cached else "compiled"
            took = f"{row.tokens_per_second:,.0f} tokens/s, {how} in {row.compile_seconds:.1f} s"
            stderr().print(f"  {seconds}, {took}")
    finally:  # rows that were measured before an error, such as a length that does not fit, are shown
        if rows:
            if json:
                print_json(
                    bench.to_json(rows, model=name, dtype=network.dtype.name, **({"mesh": mesh} if mesh else {}))
                )
            else:
                show_table(bench.table(rows))
    if plot is not None:
        bench.plot(rows, plot, title=name)


@app.command()
def kernels(
    lengths: Annotated[
        str, typer.Option(help="Sequence lengths in tokens; K and M count 1,024 and its square.")
    ] = "8K",
    patterns: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            help="vertical-slash[:columns=,window=,clusters=], a-shape[:sink=,window=], "
            "block-sparse[:blocks=]; may be repeated. Default: all three.",
        ),
    ] = None,
    heads: Annotated[
        list[str] | None, typer.Option(help="Query heads/KV heads/head_dim; may be repeated. Default: 32/8/128.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Sequences.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="Turns or runs, of which the median is shown.")] = 5,
    dense_limit: Annotated[str, typer.Option(help="Beyond this length dense attention is not timed.")] = "512K",
    implementation: Annotated[
        str, typer.Option(help="What serves the plans, such as hopper, mma or xla. Default: the best for this device.")
    ] = "",
    peers: Annotated[
        bool,
        typer.Option(
            "--peers", help="Also JAX's own flash attention; PyTorch's, tokamax's and minference's if installed."
        ),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write time against length as an image (needs matplotlib).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time the attention kernels on random inputs against dense attention.

    A figure is shown only for an output whose sampled rows agree with an exact computation. Sparse and dense attention
    take turns of a quarter of a second, as a GPU at its power limit slows down within that time; compare the figures of
    one run.

    Example: minference-jax bench kernels --lengths 8K,32K --pattern a-shape
    """
    from minference_jax.bench import kernels as bench

    try:
        cases = [Case.parse(text) for text in patterns] if patterns else bench.CASES
        layouts = [bench.Layout.parse(text, batch) for text in heads or ["32/8/128"]]
    except ValueError as error:
        raise usage_error(str(error)) from None
    if implementation:
        with usage("--implementation"):
            find_backend(implementation, sparse=True)
    if plot is not None:
        check_picture("--plot", plot)
    sizes = parse_lengths("--lengths", lengths)
    rows, limit = [], parse_length(dense_limit)
    options: dict[str, Any] = {"repeats": repeats, "implementation": implementation or None}
    for row in bench.bench_kernels(sizes, cases, layouts, peers=peers, dense_limit=limit, **options):
        rows.append(row)
        stderr().print(f"  {row.pattern}, {row.layout}, {row.length:,} tokens: {row.attend_ms:.3g} ms")
    if plot is not None:
        bench.plot(rows, plot)
    if json:
        print_json(bench.to_json(rows))
    else:
        console = stdout()
        console.width = max(console.width, 130)
        console.print(bench.table(rows))
        for line in bench.peer_lines(rows):
            console.print(line)


@app.command()
def operator(
    ctx: typer.Context,
    patterns: Annotated[list[str], typer.Option("--pattern", help=f"May be repeated: {PATTERN_HELP}")],
    lengths: Annotated[
        str, typer.Option(help="Sequence lengths in tokens; K and M count 1,024 and its square.")
    ] = "8K",
    heads: Annotated[str, typer.Option(help="Query heads/KV heads/head_dim of random inputs.")] = "32/8/128",
    model: Annotated[
        Path | None, typer.Option(help="Take queries, keys and values from a layer of this model instead.")
    ] = None,
    text: Annotated[str, typer.Option(help="What the model reads; default: the package's excerpt of a novel.")] = "",
    layer: Annotated[int, typer.Option(min=0, help="Of the model.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="Turns, of which the median is shown.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time sparse attention by pattern as a whole (index, tables and kernel) beside dense attention.

    Example: minference-jax bench operator --pattern vertical-slash:columns=64 --lengths 8K
    """
    from minference_jax.bench import kernels as bench
    from minference_jax.bench import operator as whole

    with usage("--pattern"):
        chosen = [parse_pattern(name) for name in patterns]
    sizes = parse_lengths("--lengths", lengths)
    rows = []
    if model is None:
        refuse(ctx, "without --model", "text", "layer")
        with usage("--heads"):
            layout = bench.Layout.parse(heads)
        inputs = ((f"random {layout}", bench.random_arrays(layout, size)) for size in sizes)
    else:
        refuse(ctx, "with --model", "heads")
        inputs = _captured(model, text, layer, sizes)
    for name, arrays in inputs:
        for row in whole.time_operators(arrays, chosen, inputs=name, turns=repeats):
            rows.append(row)
            stderr().print(f"  {row.pattern}, {row.length:,} tokens: {row.whole_ms:.3g} ms, dense {row.dense_ms:.3g}")
    if json:
        print_json(whole.to_json(rows))
    else:
        show_table(whole.table(rows))


app.command("tradeoff")(tradeoff)


def _captured(path: Path, text: str, layer: int, sizes: list[int]) -> Any:
    import jax.numpy as jnp

    from minference_jax.bench.operator import captured, check_layer
    from minference_jax.data import load_text
    from minference_jax.models.capture import check_capture
    from minference_jax.text.tokenizer import load_tokenizer

    config = _config(path, "")
    with usage("--layer"):
        check_layer(config, layer)
    check_capture(config, max(sizes))
    ids = load_tokenizer(path).encode(read_full_text(text) if text else load_text())
    if len(ids) < max(sizes):
        raise ValueError(f"the text has {len(ids):,} tokens, fewer than {max(sizes):,}; give a longer --text")
    network = _network(path, config, chosen_dtype(""))
    for size in sizes:
        yield f"{path.name}, layer {layer}", captured(network, jnp.asarray([ids[:size]], jnp.int32), layer)


def _methods(names: str) -> dict:
    from minference_jax.bench.prefill import METHODS

    unknown = [name for name in names.split(",") if name not in METHODS]
    if unknown:
        raise usage_error(f"unknown method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return {name: METHODS[name] for name in METHODS if name in names.split(",")}


def _config(model: Path | None, random_weights: str) -> Any:
    from minference_jax.checkpoints.convert import open_checkpoint
    from minference_jax.checkpoints.presets import known_config
    from minference_jax.models.config import LlamaConfig

    return known_config(random_weights) if model is None else LlamaConfig.from_hf(open_checkpoint(model).config)


def _network(model: Path | None, config: Any, dtype: str, mesh: Any = None):
    """The model, or one of random weights where there is none."""
    import jax

    from minference_jax.models.llama import Llama

    check_mesh(mesh, config)
    if model is not None:
        return Llama.from_pretrained(model, dtype=dtype, mesh=mesh)
    return Llama.random(config, jax.random.key(0), dtype, mesh=mesh)
