"""`search`: each head's pattern and budgets, found on texts, into a file; and the check on texts held out."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from minference_jax.cli.completion import complete_dtype
from minference_jax.cli.console import (
    check_picture,
    chosen_dtype,
    command_line,
    print_json,
    read_full_text,
    refuse,
    split_names,
    stderr,
    stdout,
    usage,
    usage_error,
)
from minference_jax.cli.lengths import length_option
from minference_jax.cli.progress import progress
from minference_jax.patterns.resolve import resolve_patterns
from minference_jax.patterns.text import parse_pattern

TASK_SEED = 1
"""Of the prompts of `--tasks`; that of `eval` is 0 by default."""


SEARCHED = (
    *("out", "samples", "tasks", "target", "cost", "objective", "budgets", "query_tiles", "end_tiles"),
    *("plot", "wait", "restart"),
)
"""Parameters of a search alone, not of the check of patterns that are there."""


def search(
    ctx: typer.Context,
    texts: Annotated[list[str] | None, typer.Argument(help="More texts, after --text.", show_default=False)] = None,
    model: Annotated[Path | None, typer.Option(help="A Hugging Face directory or a .gguf file.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to search on; repeatable; - is stdin.")] = None,
    out: Annotated[Path | None, typer.Option(help="The pattern file to write.")] = None,
    tokens: Annotated[int, length_option(least=128, help="Of each sample.")] = 4096,
    samples: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Of each text, one after the other; of each task.")
    ] = 1,
    tasks: Annotated[
        str,
        typer.Option(
            help="Search on prompts of these tasks of `eval` too, with commas, hidden in the first text; drawn with"
            " another seed than evaluations have by default."
        ),
    ] = "",
    target: Annotated[
        str,
        typer.Option(
            help="What a layer may cost: a density such as 0.25, 'a-shape:sink=1024,window=4096', or a time such as"
            " 2.5ms with --cost measured. Default: that A-shape, scaled down for samples shorter than 32,768 tokens."
        ),
    ] = "",
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="Such as 'vertical-slash:columns=512,tiles=64'; repeatable. Default: all known ones."),
    ] = None,
    paper: Annotated[bool, typer.Option(help="The original's candidates only (MInference, Table 7).")] = False,
    cost: Annotated[str, typer.Option(help="visited (keys that the kernel visits) or measured (seconds).")] = "visited",
    objective: Annotated[str, typer.Option(help="Over several samples: mean or worst.")] = "mean",
    budgets: Annotated[str, typer.Option(help="per-head, or equal in all heads.")] = "per-head",
    query_tiles: Annotated[int, typer.Option(min=1, help="Tiles of 128 queries whose rows are scored.")] = 16,
    end_tiles: Annotated[
        int, typer.Option(min=0, help="As many at each sample's end are scored besides, and count as much.")
    ] = 0,
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU.", autocompletion=complete_dtype),
    ] = "",
    plot: Annotated[
        Path | None, typer.Option(help="Draw the patterns, their density, recall and error, to a .png, .pdf or .svg.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Where another process uses --out, wait for it.")] = False,
    restart: Annotated[bool, typer.Option(help="Forget what an interrupted search has kept.")] = False,
    patterns: Annotated[str, typer.Option(help="Verify these instead of searching: a file or a preset.")] = "",
    verify: Annotated[list[str] | None, typer.Option(help="A held-out text to compare on; repeatable.")] = None,
    verify_tokens: Annotated[
        list[int] | None,
        length_option(least=128, help="Prompt length to compare at; repeatable. Default: --tokens."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the pattern and the budgets of each head, by the error of its output at equal kernel cost.

    An interrupted search goes on where it was when it is started again. With --verify the result is compared with
    every candidate given to all heads alike, at equal total visited keys.

    Example: minference-jax search --model DIR --text book.txt --out patterns.json --tokens 8K
    """
    texts = [*(text or []), *(texts or [])]
    if model is None:
        raise usage_error("give --model")
    if bool(patterns) == bool(texts):
        raise usage_error("give --text FILES and --out FILE to search, or --patterns FILE and --verify FILES")
    if texts and out is None:
        raise usage_error("give --out FILE for the patterns that are found")
    if patterns and not verify:
        raise usage_error("--patterns is only verified here: give --verify FILES")
    if not verify:
        refuse(ctx, "without --verify", "verify_tokens")
    if candidate:
        refuse(ctx, "with --candidate", "paper")
    if not texts:
        refuse(ctx, "with --patterns, which are not searched", *SEARCHED)
    if plot is not None:
        check_picture("--plot", plot)
    dtype = chosen_dtype(dtype)
    if [*texts, *(verify or [])].count("-") > 1:
        raise usage_error("standard input can be read once only")

    from minference_jax.checkpoints.convert import open_checkpoint
    from minference_jax.models.capture import check_capture
    from minference_jax.models.config import LlamaConfig
    from minference_jax.runs.files import check_output_file
    from minference_jax.search import PAPER, Settings, default_candidates
    from minference_jax.search.driver import check_samples
    from minference_jax.text.tokenizer import load_tokenizer

    with usage("--candidate"):
        chosen = tuple(map(parse_pattern, candidate)) if candidate else PAPER if paper else default_candidates()
    wanted = _target(target)
    with usage("settings"):
        settings = Settings(wanted, chosen, cost, objective, budgets, query_tiles, end_tiles)  # pyright: ignore[reportArgumentType]
    if out is not None:
        with usage("--out"):
            check_output_file(out)
    # Everything that may be wrong is looked at before the weights are read.
    config = LlamaConfig.from_hf(open_checkpoint(model).config)
    known = _patterns(patterns, config) if patterns else None
    tokenizer = load_tokenizer(model)
    first = read_full_text(texts[0]) if texts else ""
    ids = [row for name in texts for row in _cut(tokenizer, name, tokens, samples, first if name == texts[0] else None)]
    if tasks:
        ids += _prompts(tokenizer, tasks, first, tokens, samples)
    if texts:
        with usage("settings"):
            check_samples([len(row) for row in ids])
    for length in (*map(len, ids), *(verify_tokens or ([tokens] if verify else []))):
        check_capture(config, length)
    held_out = [_HeldOut.cut(tokenizer, name, verify_tokens or [tokens]) for name in verify or ()]
    found: dict[str, Any] = {}
    network = _load(model, dtype)
    if texts:
        assert out is not None
        found["search"] = _search(network, ids, out, settings, restart, wait, model)
        if not json:
            stdout().print(_summary(found["search"], out))
        known = _patterns(str(out), config)
        if plot is not None:
            from minference_jax.viz import plot_patterns

            plot_patterns(known, plot, title=f"{model.absolute().name}: {out.name}")
            found["search"]["plot"] = str(plot)
            stderr().print(f"Written: {plot}", markup=False)
    if held_out:
        found["verify"] = [row for one in held_out for row in one.verify(network, known, chosen, json)]
    if json:
        print_json(found)


def _patterns(name: str, config: Any) -> Any:
    with usage("--patterns"):
        patterns = resolve_patterns(name, config.num_layers, config.num_heads)
    if patterns is None:
        raise usage_error("dense attention is what patterns are compared with: nothing to verify")
    return patterns


def _load(model: Path, dtype: str) -> Any:
    from minference_jax.models.llama import Llama

    with progress("Reading weights") as update:
        return Llama.from_pretrained(model, dtype=dtype, progress=update)


def _cut(tokenizer: Any, name: str, tokens: int, samples: int, text: str | None = None) -> list[list[int]]:
    """The first `samples` runs of `tokens` tokens of a text, which is read unless given."""
    ids = tokenizer.encode(read_full_text(name) if text is None else text)
    if len(ids) < tokens * samples:
        raise ValueError(f"{name} has {len(ids):,} tokens; {samples} x {tokens:,} are wanted (see --tokens)")
    return [ids[i * tokens : (i + 1) * tokens] for i in range(samples)]


def _prompts(tokenizer: Any, tasks: str, text: str, tokens: int, samples: int) -> list[list[int]]:
    """The first `samples` prompts of each task, of at most `tokens` tokens."""
    from minference_jax.eval.tasks import make_tasks

    with usage("--tasks"):
        chosen = make_tasks(split_names("--tasks", tasks), text=text)
    return [list(task.sample(tokenizer, tokens, i, TASK_SEED).tokens) for task in chosen for i in range(samples)]


def _search(
    network: Any, ids: list[list[int]], out: Path, settings: Any, restart: bool, wait: bool, model: Path
) -> dict[str, Any]:
    import resource

    import jax
    import jax.numpy as jnp

    from minference_jax.patterns.files import load_about
    from minference_jax.search import search_to_file

    started, first = time.perf_counter(), []

    with progress("Searching layers", keeps=f"{out}.partial", unit="layers") as update:

        def report(done: int, total: int) -> None:
            update(done, total)
            first.append(time.perf_counter())
            if done == update.first:  # those that were kept
                return
            each = (first[-1] - first[0]) / max(len(first) - 1, 1)  # the first layer also compiles
            left = f", about {each * (total - done):.0f} s left" if len(first) > 1 and done < total else ""
            stderr().print(f"layer {done} of {total}, {first[-1] - started:.0f} s{left}", soft_wrap=True)

        about = {"model": model.absolute().name, "command": command_line()}
        lengths = [len(row) for row in ids]
        rows = [row + [0] * (max(lengths) - len(row)) for row in ids]
        samples, sizes = jnp.asarray(rows, jnp.int32), jnp.asarray(lengths, jnp.int32)
        options: dict[str, Any] = {"restart": restart, "wait": wait, "progress": report}
        search_to_file(network, samples, out, lengths=sizes, settings=settings, about=about, **options)
    memory = jax.devices()[0].memory_stats() or {}
    peak = memory.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    figures = {"seconds": time.perf_counter() - started, "peak memory GiB": round(peak / 2**30, 2)}
    return {"out": str(out), **figures, **load_about(out)}


def _summary(found: dict[str, Any], out: Path) -> str:
    from minference_jax.patterns.describe import count_kinds
    from minference_jax.patterns.files import load_patterns

    kinds = count_kinds(load_patterns(out))
    return (
        f"{out}: {', '.join(f'{count} {kind}' for kind, count in kinds)}\n"
        f"mean output error {found['mean output error']:.4f}, density {found['mean density']:.4f},"
        f" recall {found['mean recall']:.4f}; {found['seconds']:.0f} s, {found['peak memory GiB']:.1f} GiB at most"
    )


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """A text that no search has seen, cut at each length that patterns are compared at."""

    name: str
    prompts: list[list[int]]

    @classmethod
    def cut(cls, tokenizer: Any, name: str, lengths: list[int]) -> _HeldOut:
        longest = _cut(tokenizer, name, max(lengths), 1)[0]
        return cls(name, [longest[:tokens] for tokens in lengths])

    def verify(self, network: Any, patterns: Any, candidates: Any, quiet: bool) -> list[dict[str, Any]]:
        """A table for each length, printed unless `quiet`."""
        import jax.numpy as jnp

        from minference_jax.search.verify import format_table, verify

        tables = []
        for ids in self.prompts:
            rows = verify(
                network,
                jnp.asarray([ids], jnp.int32),
                {"searched": patterns},
                candidates=candidates,
                say=lambda line: stderr().print(line, soft_wrap=True, markup=False),
            )
            tables.append({"text": self.name, "tokens": len(ids), "rows": [row._asdict() for row in rows]})
            if not quiet:
                title = f"{Path(self.name).name}, {len(ids):,} tokens"
                stdout().print(f"\n{title}\n\n{format_table(rows)}", markup=False)
        return tables


def _target(text: str) -> Any:
    from minference_jax.search import Latency

    if not text:
        return None
    try:
        number = float(text.removesuffix("ms"))
        if not math.isfinite(number):
            raise usage_error(f"--target {text!r} is not finite")
        return Latency(number) if text.endswith("ms") else number
    except ValueError:
        if text[0].isalpha():
            with usage("--target"):
                return parse_pattern(text)
        raise usage_error(f"--target {text!r} is no density, no time in ms and no pattern") from None
