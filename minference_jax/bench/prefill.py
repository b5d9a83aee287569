"""Times the prefill of whole models, dense and sparse, and its pieces; random token ids, so no input is needed.

Every row is one compiled program, run after a warm-up. The pieces of a layer are timed one by one at the same shape,
with the arrays that the model itself makes of the prompt. Compare rows of one run only: a GPU at its power limit slows
down as it warms up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from minference_jax.bench.kernels import environment
from minference_jax.bench.prefill_pieces import Pieces, time_pieces
from minference_jax.bench.timing import median_seconds
from minference_jax.extras import naming_extra
from minference_jax.models.forward import rows_at_once
from minference_jax.models.llama import Llama
from minference_jax.models.programs import PREFILL
from minference_jax.patterns import AShape, HeadPatterns, Pattern
from minference_jax.planning.auto import AUTO, PAPER_PATTERN
from minference_jax.planning.memory import advise

METHODS: dict[str, tuple[Pattern | str | None, bool]] = {
    "dense": (None, False),
    "a-shape": (AShape(sink=1024, window=4096), False),
    "minference": (PAPER_PATTERN, False),
    "minference-fp8": (PAPER_PATTERN, True),
    "auto": (AUTO, False),
    "auto-fp8": (AUTO, True),
}
"""Name → the pattern of all heads (None: dense) and whether projections run in FP8.

Slashes are counted in tiles: of random weights and tokens, lines scatter over all distances, and would visit most of
the matrix. "auto" is whatever `patterns="auto"` takes at a length.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    - `seconds`: of one prefill of one prompt, to the logits of its last token. `estimated`: not run; the sum of the
      pieces.
    - `attention`, `index`, `projections`: seconds of all layers, each piece timed by itself (NaN where it was not).
    - `memory_gib`: weights, arguments and temporary buffers of the program as compiled; `device_peak_gib`: the most
      that the process has had allocated so far (NaN where the device does not say).
    - `density`: mean visited share of the causal cells (NaN without pieces).
    - `compile_seconds`: tracing, lowering, and compiling or loading; `cached`: loaded from the compile cache.
    """

    tokens: int
    method: str
    seconds: float
    tokens_per_second: float
    speedup: float
    attention: float
    index: float
    projections: float
    density: float
    memory_gib: float
    device_peak_gib: float
    compile_seconds: float
    estimated: bool = False
    cached: bool = False


class Case(NamedTuple):
    """What a row is of: `network` has the method's patterns and projections, `patterns` are those of this length."""

    method: str
    patterns: HeadPatterns | None
    network: Llama
    tokens: int
    dense_limit: int

    @property
    def estimated(self) -> bool:
        """Whether it is dense attention that would take too long."""
        return self.patterns is None and self.tokens > self.dense_limit

    @property
    def prompt(self) -> Any:
        """Random token ids `[1, tokens]`, the same for every method."""
        vocabulary = self.network.config.vocab_size
        return jax.random.randint(jax.random.key(self.tokens), (1, self.tokens), 0, vocabulary, jnp.int32)


class Compiled(NamedTuple):
    """A program, the seconds that it took to make, and whether it came from the compile cache."""

    program: Any
    seconds: float
    cached: bool


def bench_prefill(
    model: Llama,
    lengths: Sequence[int],
    methods: Mapping[str, tuple[Pattern | HeadPatterns | str | None, bool]] = METHODS,
    *,
    repeats: int = 3,
    dense_limit: int = 1 << 17,
    pieces: bool = True,
    jobs: int = 1,
    say: Callable[[str], None] | None = None,
) -> Iterator[Row]:
    """Yields one row for each length and method. A model on a mesh is timed as a whole: no pieces, no estimated rows.

    **Arguments:**

    - `methods`: name → (pattern of all heads, or one for each; FP8 projections). "dense" comes first, so that others
      can be compared. Shares and density are those of the first layer.
    - `repeats`: runs of which the median is taken; a run of more than three seconds is not repeated.
    - `dense_limit`: beyond it, dense attention is timed in one layer only, and its row estimated (at a million tokens
      an 8B model would take ten minutes).
    - `pieces`: time the pieces too; otherwise only those of estimated rows. (Compiling them takes longer than running.)
    - `jobs`: with more than one, all programs are compiled first, so many at a time; `compile_seconds` are then those
      of a program beside others.
    """
    say = say or (lambda line: None)
    narrow = model
    if any(fp8 for _, fp8 in methods.values()):
        say("quantizing the projections")
        narrow = model.with_fp8_projections()
    networks = {name: (narrow if fp8 else model).with_patterns(p) for name, (p, fp8) in methods.items()}
    cases = [
        Case(name, networks[name].patterns_at(tokens), networks[name], tokens, dense_limit)
        for tokens in lengths
        for name in methods
    ]
    if model.mesh is not None:
        cases, pieces = [case for case in cases if not case.estimated], False
    programs: Iterator[Compiled | None] = (None if case.estimated else _compile(case) for case in cases)
    if jobs > 1:
        say(f"compiling, {jobs} programs at a time")
        with ThreadPoolExecutor(jobs) as pool:
            ahead = deque(pool.map(lambda case: None if case.estimated else _compile(case), cases))
        programs = (ahead.popleft() for _ in cases)  # so that each is let go once it has run
    dense_seconds: dict[int, float] = {}
    for case in cases:
        say(f"{case.tokens:,} tokens, {case.method}")
        fp8 = case.network.fp8_projections
        options = {"dtype": model.dtype.name, "cache": None, "fp8_projections": fp8, "patterns": case.patterns}
        options["mesh"] = model.mesh
        with advise(model.config, tokens=case.tokens, **options):
            row = _time(case, next(programs), repeats, pieces=pieces or case.estimated)
        if case.method == "dense":
            dense_seconds[case.tokens] = row.seconds
        yield dataclasses.replace(row, speedup=dense_seconds.get(case.tokens, math.nan) / row.seconds)


def arguments(model: Llama, tokens: Any) -> tuple:
    """The traced arguments of a prefill without a cache."""
    lengths = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
    inputs = model.exchange.place(model.config, (tokens, lengths, lengths))
    return model.params(), model.patterns_for(tokens.shape[1]), *inputs, None, None, model.order(tokens.shape[1])


def compile_prefill(model: Llama, tokens: Any, **static: Any) -> tuple[Any, float]:
    """The compiled program of a prefill without a cache, to be called with `arguments(...)`; and seconds it took."""
    settings = {
        "rows_at_once": rows_at_once(*tokens.shape),
        "implementation": None,
        "return_info": False,
        "exchange": model.exchange,
    }
    settings |= static
    started = time.perf_counter()
    inputs = arguments(model, tokens)
    program = PREFILL.form(inputs[0], model.exchange).lower(model.config, *inputs, **settings).compile()
    return program, time.perf_counter() - started


def program_bytes(program: Any) -> int:
    """What a compiled program holds at once: arguments (the weights), results and temporary buffers."""
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def _compile(case: Case) -> Compiled:
    prompt = case.prompt
    with compile_cache_hits() as hits:
        program, seconds = compile_prefill(case.network, prompt)
    return Compiled(program, seconds, bool(hits))


@contextlib.contextmanager
def compile_cache_hits() -> Iterator[list[str]]:
    """A list of the programs that this thread loads from the compile cache meanwhile (one event for each)."""
    hits, thread = [], threading.get_ident()

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits" and threading.get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _time(case: Case, compiled: Compiled | None, repeats: int, *, pieces: bool) -> Row:
    """A row whose speed-up is still unknown; of an estimated one nothing is compiled."""
    prompt, memory, seconds = case.prompt, math.nan, math.nan
    compile_seconds, cached = math.nan, False
    if compiled is not None:
        compile_seconds, cached = compiled.seconds, compiled.cached
        program = compiled.program
        memory = program_bytes(program) / 2**30
        seconds = median_seconds(lambda: program(*arguments(case.network, prompt)), repeats)
        del program, compiled
    found = Pieces(math.nan, math.nan, math.nan, 1.0 if case.patterns is None else math.nan)
    if pieces:
        first = None if case.patterns is None else case.patterns.layer(0)
        found = time_pieces(case.network, prompt, first, lambda run: median_seconds(run, repeats))
    if case.estimated:
        seconds = found.attention + found.indexing + found.projections
    device = jax.devices()[0].memory_stats() or {}
    return Row(
        tokens=case.tokens,
        method=case.method,
        seconds=seconds,
        tokens_per_second=case.tokens / seconds,
        speedup=math.nan,
        attention=found.attention,
        index=found.indexing,
        projections=found.projections,
        density=found.density,
        memory_gib=memory,
        device_peak_gib=device.get("peak_bytes_in_use", math.nan) / 2**30,
        compile_seconds=compile_seconds,
        estimated=case.estimated,
        cached=cached,
    )


def table(rows: Sequence[Row], facts: Mapping[str, Any] | None = None) -> Any:
    """A rich table of the rows; `facts`: where they were measured, by default here."""
    with naming_extra("a table"):
        from rich import box
        from rich.table import Table

    title = "  ".join(f"{name}={value}" for name, value in (environment() if facts is None else facts).items())
    result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    headings = ("tokens", "method", "seconds", "tokens/s", "speed-up", "attention", "index", "projections")
    for heading in (*headings, "density", "GiB", "compile, s"):
        result.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for r in rows:
        pieces = (r.attention, r.index, r.projections)
        shares = ("" if math.isnan(piece) else f"{piece / r.seconds:.0%}" for piece in pieces)
        result.add_row(
            f"{r.tokens:,}",
            r.method,
            f"{'~' if r.estimated else ''}{r.seconds:.3g}",
            f"{r.tokens_per_second:,.0f}",
            "" if math.isnan(r.speedup) else f"{r.speedup:.2f}",
            *shares,
            "" if math.isnan(r.density) else f"{r.density:.3f}",
            "" if math.isnan(r.memory_gib) else f"{r.memory_gib:.1f}",
            "" if math.isnan(r.compile_seconds) else f"{r.compile_seconds:.1f}{' (cache)' if r.cached else ''}",
        )
    return result


def to_json(rows: Sequence[Row], **facts: Any) -> dict[str, Any]:
    """The environment, `facts` and all rows."""
    return {"environment": environment(), **facts, "rows": [dataclasses.asdict(r) for r in rows]}


def from_json(found: Mapping[str, Any]) -> list[Row]:
    """The rows of what `to_json` gave. JSON has no NaN: what was not measured is null there."""
    rows: list[dict[str, Any]] = [
        {name: math.nan if value is None else value for name, value in row.items()} for row in found["rows"]
    ]
    return [Row(**row) for row in rows]


def plot(rows: Sequence[Row], path: Any, title: str = "") -> None:
    """Latency and speed-up over dense against length, both axes logarithmic, as an image file.

    Raises ModuleNotFoundError without matplotlib.
    """
    with naming_extra("a plot"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    latency, speedup = figure.subplots(1, 2)
    for method in dict.fromkeys(r.method for r in rows):
        mine = sorted((r for r in rows if r.method == method), key=lambda r: r.tokens)
        lengths = [r.tokens for r in mine]
        (line,) = latency.plot(lengths, [r.seconds for r in mine], marker="o", label=method)
        guessed = [r for r in mine if r.estimated]
        latency.plot(
            [r.tokens for r in guessed], [r.seconds for r in guessed], "o", mfc="white", color=line.get_color()
        )
        speedup.plot(lengths, [r.speedup for r in mine], marker="o", label=method)
    for axes, name in ((latency, "prefill, seconds"), (speedup, "speed-up over dense")):
        axes.set(xscale="log", yscale="log", xlabel="prompt, tokens", ylabel=name)
        axes.set_xscale("log", base=2)
        marks = sorted({r.tokens for r in rows})
        axes.set_xticks(marks, [_short(tokens) for tokens in marks])
        axes.grid(True, which="both", alpha=0.3)
    latency.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _short(tokens: int) -> str:
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)
