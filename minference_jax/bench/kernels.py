"""Times the sparse kernels against dense attention, and refuses a figure for an output that is wrong.

TF/s counts 4 · head_dim operations for each visible (query, key) cell, for the sparse kernels those of the plan. A GPU
at its power limit slows down as it warms up: compare figures of one run only.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minference_jax.bench import peers as others
from minference_jax.bench.shapes import block_bench_plan, exact_row, sample_rows, vertical_slash_bench_plan
from pallas_kernels import SparsePlan, hopper_tables, plan_builders, sparse_attention
from pallas_kernels.dispatch import choose_implementation

PATTERNS = ("vertical_slash", "a_shape", "block_sparse")
LARGEST_ERROR = 5e-3  # of sampled rows: rounding of 16-bit probabilities and outputs gives 2e-3


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one benchmark: sequences, query heads, KV heads and head_dim."""

    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        return f"B{self.batch} {self.heads}/{self.kv_heads}/{self.head_dim}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. Times in milliseconds; `ratio` is dense time over sparse time."""

    pattern: str
    layout: str
    length: int
    density: float
    plan_ms: float
    attend_ms: float
    tflops: float
    dense_ms: float
    dense_tflops: float
    ratio: float
    error: float
    implementation: str
    peers: dict[str, float | str] = dataclasses.field(default_factory=dict)


def environment() -> dict[str, str]:
    """GPU, driver, versions and commit: what a figure means nothing without."""
    device = jax.devices()[0]
    facts = {"device": device.device_kind, "jax": jax.__version__, "driver": "unknown", "commit": "unknown"}
    commands = {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        "commit": ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
    }
    for name, command in commands.items():
        try:
            facts[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            continue
    return facts


def bench_plan(pattern: str, layout: Layout, length: int) -> SparsePlan:
    """The plan that is timed: 1,024 columns and about 5,900 distances, sink 1024 + window 4096, or 100 tiles."""
    if pattern == "a_shape":
        return plan_builders.a_shape_plan(layout.batch, layout.heads, sink=1024, window=4096)
    if pattern == "vertical_slash":
        return vertical_slash_bench_plan(layout.batch, layout.heads, length)
    if pattern == "block_sparse":
        return block_bench_plan(layout.batch, layout.heads, length)
    raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}; got {pattern!r}")


def bench_kernels(
    lengths: Sequence[int] = (16_384, 131_072),
    patterns: Sequence[str] = PATTERNS,
    layouts: Sequence[Layout] = (Layout(),),
    *,
    peers: bool = False,
    dense_limit: int = 1 << 19,
    repeats: int = 5,
) -> Iterator[Row]:
    """Times every combination, one row at a time.

    **Arguments:** `peers`: also time other implementations. `dense_limit`: beyond this length cuDNN is not timed (it
    takes 18 s at 1M tokens).

    **Raises:** RuntimeError when sampled rows differ from an exact computation by more than `LARGEST_ERROR`.
    """
    for layout in layouts:
        for length in lengths:
            arrays = _arrays(layout, length)
            cells = layout.batch * layout.heads * length * (length + 1) / 2
            dense = float("nan")
            if length <= dense_limit and jax.default_backend() == "gpu":
                dense = others.cudnn_dense(arrays, repeats)
            extra = _time_peers(arrays, repeats) if peers else {}
            for pattern in patterns:
                yield _row(pattern, layout, length, arrays, cells, dense, extra, repeats)


def _arrays(layout: Layout, length: int) -> others.Arrays:
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (layout.heads, layout.kv_heads, layout.kv_heads)

    def normal(key: jax.Array, n: int) -> jax.Array:
        return jax.random.normal(key, (layout.batch, length, n, layout.head_dim), jnp.bfloat16)

    draw = jax.jit(normal, static_argnums=1)
    q, k, v = (draw(key, n) for key, n in zip(keys, heads, strict=True))
    return q, k, v


def _time_peers(arrays: others.Arrays, repeats: int) -> dict[str, float | str]:
    timed: dict[str, float | str] = {}
    for name, peer in others.DENSE_PEERS.items():
        try:
            timed[name] = peer(arrays, repeats)
        except Exception as error:  # a peer that cannot run is a finding, not a failure of ours
            timed[name] = f"{type(error).__name__}: {str(error)[:80]}"
    return timed


def _row(pattern, layout, length, arrays, cells, dense, extra, repeats) -> Row:
    plan = bench_plan(pattern, layout, length)
    q, k, v = arrays
    choice = choose_implementation(q, k, v, plan)
    # The arrays are arguments, never closed over: constants of this size would be copied into the program.
    attend = jax.jit(lambda q, k, v, plan: sparse_attention(q, k, v, plan))
    out = attend(*arrays, plan)
    error = _largest_error(out, arrays, plan)
    del out
    if not error <= LARGEST_ERROR:
        raise RuntimeError(f"{pattern} at {length} tokens is wrong: relative error {error:.1e} of sampled rows")
    tables = jax.jit(lambda q, k, v, p: hopper_tables.prepare(p, q, k, v, lengths=None, q_offset=jnp.int32(0)))
    whole = others.median_ms(lambda: attend(*arrays, plan), repeats)
    planned = others.median_ms(lambda: tables(*arrays, plan), repeats) if choice.name == "hopper" else float("nan")
    density = float(jnp.mean(plan.density(length, length)))
    operations = 4 * layout.head_dim * cells
    return Row(
        pattern=pattern,
        layout=str(layout),
        length=length,
        density=density,
        plan_ms=planned,
        attend_ms=whole,
        tflops=operations * density / whole / 1e9,
        dense_ms=dense,
        dense_tflops=operations / dense / 1e9,
        ratio=dense / whole,
        error=error,
        implementation=choice.name,
        peers=extra,
    )


def _largest_error(out, arrays: others.Arrays, plan: SparsePlan) -> float:
    errors = []
    for head, row in sample_rows(out.shape[1], out.shape[2], count=6):
        expected, _ = exact_row(arrays, plan, 0, head, row)
        actual = np.asarray(out[0, row, head], np.float64)
        errors.append(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    return float(max(errors))


def show(rows: Sequence[Row]) -> None:
    """Prints the rows as a table, under the facts of `environment()`."""
    from rich.console import Console
    from rich.table import Table

    titles = [
        "pattern",
        "heads",
        "tokens",
        "density",
        "plan+gather,ms",
        "attend,ms",
        "TF/s",
        "dense,ms",
        "dense,TF/s",
        "speed-up",
        "error",
    ]
    table = Table(*(title.replace(",", "\n") for title in titles), caption="attend includes plan+gather")
    for r in rows:
        values = (f"{r.density:.3f}", f"{r.plan_ms:.2f}", f"{r.attend_ms:.2f}", f"{r.tflops:.0f}", f"{r.dense_ms:.1f}")
        last = (f"{r.dense_tflops:.0f}", f"{r.ratio:.1f}", f"{r.error:.1e}")
        table.add_row(r.pattern, r.layout, f"{r.length:,}", *values, *last)
    console = Console(width=130)
    console.print(" ".join(f"{name}={value}" for name, value in environment().items()))
    console.print(table)
    for name, value in (rows[0].peers if rows else {}).items():
        console.print(f"{name}: {value if isinstance(value, str) else f'{value:.1f} ms'}")


def to_json(rows: Sequence[Row]) -> str:
    """The environment and all rows, as JSON text."""
    return json.dumps({"environment": environment(), "rows": [dataclasses.asdict(r) for r in rows]}, indent=1)
