"""Times the sparse kernels against dense attention, and refuses a figure for an output that is wrong.

TF/s counts 4 · head_dim operations for each visible (query, key) cell, for the sparse kernels those of the plan. Sparse
and dense attention take turns of the same length (`bench.timing`), so that both meet the GPU at the same clock rates;
GPUs and sessions differ all the same: compare figures of one run only.
"""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minference_jax.attention import make_plan
from minference_jax.bench import official
from minference_jax.bench import peers as others
from minference_jax.bench.cases import BUDGETS, Case
from minference_jax.bench.shapes import exact_row, sample_rows
from minference_jax.bench.timing import in_turns_ms, median_ms
from minference_jax.extras import naming_extra
from pallas_kernels import Choice, SparsePlan, choose_implementation, sparse_attention
from pallas_kernels.backends import Implementation

if TYPE_CHECKING:
    from rich.table import Table

CASES = tuple(Case(name) for name in BUDGETS)
LARGEST_ERROR = 5e-3  # of sampled rows: rounding of 16-bit probabilities and outputs gives 2e-3


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one benchmark: sequences, query heads, KV heads and head_dim."""

    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @staticmethod
    def parse(text: str, batch: int = 1) -> Layout:
        """A layout from `32/8/128`. Raises ValueError for anything else."""
        numbers = text.split("/")
        if len(numbers) != 3 or not all(x.isdecimal() and int(x) for x in numbers) or int(numbers[0]) % int(numbers[1]):
            raise ValueError(f"{text!r} is no head layout; write query heads/KV heads/head_dim, as in 32/8/128")
        return Layout(batch, *map(int, numbers))

    def __str__(self) -> str:
        return f"B{self.batch} {self.heads}/{self.kv_heads}/{self.head_dim}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. Times in milliseconds.

    `estimate_ms`: the online index with the pattern's budgets; `attend_ms`: attention with a given plan, `plan_ms` of
    it for the kernel's tables and gathered columns; `ratio`: dense time over `attend_ms`; `error`: largest relative
    error of sampled rows.
    """

    pattern: str
    layout: str
    length: int
    density: float
    estimate_ms: float
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


def bench_kernels(
    lengths: Sequence[int] = (16_384, 131_072),
    cases: Sequence[Case] = CASES,
    layouts: Sequence[Layout] = (Layout(),),
    *,
    peers: bool = False,
    dense_limit: int = 1 << 19,
    repeats: int = 5,
    implementation: Implementation | None = None,
) -> Iterator[Row]:
    """Times every combination; all rows of one layout and length together.

    **Arguments:** `cases`: patterns with budgets. `peers`: also time other implementations. `dense_limit`: beyond this
    length cuDNN is not timed (it takes 18 s at 1M tokens). `repeats`: turns of attention and cuDNN, single calls of the
    rest; medians are shown. `implementation`: what serves the plans, by default the best for each call.

    **Raises:** ValueError for an implementation that can't serve a call. RuntimeError when sampled rows differ from an
    exact computation by more than `LARGEST_ERROR`.
    """
    for layout in layouts:
        for length in lengths:
            arrays = random_arrays(layout, length)
            checked = [_checked(case, layout, length, arrays, implementation) for case in cases]
            runs = [c.attend for c in checked]
            with_dense = length <= dense_limit and jax.default_backend() == "gpu"
            times = in_turns_ms([*runs, others.cudnn_dense(arrays)] if with_dense else runs, repeats)
            dense = times.pop() if with_dense else float("nan")
            extra = _time_peers(arrays, repeats) if peers else {}
            for one, attend_ms in zip(checked, times, strict=True):
                sparse = _time_sparse_peers(one.case, layout, length, repeats) if peers else {}
                yield _row(one, layout, arrays, attend_ms, dense, extra | sparse, repeats)


def random_arrays(layout: Layout, length: int) -> others.Arrays:
    """Normal q, k and v of a layout, bfloat16."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (layout.heads, layout.kv_heads, layout.kv_heads)

    def normal(key: jax.Array, n: int) -> jax.Array:
        return jax.random.normal(key, (layout.batch, length, n, layout.head_dim), jnp.bfloat16)

    draw = jax.jit(normal, static_argnums=1)
    q, k, v = (draw(key, n) for key, n in zip(keys, heads, strict=True))
    return q, k, v


def _time_peers(arrays: others.Arrays, repeats: int) -> dict[str, float | str]:
    return {name: _attempt(lambda peer=peer: peer(arrays, repeats)) for name, peer in others.DENSE_PEERS.items()}


def _time_sparse_peers(case: Case, layout: Layout, length: int, repeats: int) -> dict[str, float | str]:
    shape = (layout.batch, length, layout.heads, layout.head_dim)
    return {
        name: _attempt(lambda peer=peer: peer(case, shape, repeats)) for name, peer in official.SPARSE_PEERS.items()
    }


def _attempt(measure: Callable[[], float]) -> float | str:
    try:
        return measure()
    except Exception as error:  # a peer that cannot run is a finding, not a failure of ours
        return f"{type(error).__name__}: {str(error)[:80]}"


class _Checked(NamedTuple):
    """A case whose output was found to be right."""

    case: Case
    plan: SparsePlan
    choice: Choice
    attend: Callable[[], Float[Array, "b t n h"]]
    error: float


def _checked(
    case: Case, layout: Layout, length: int, arrays: others.Arrays, implementation: Implementation | None
) -> _Checked:
    plan = case.plan(layout.batch, layout.heads, length)
    # The arrays are arguments, never closed over: constants of this size would be copied into the program.
    attend = jax.jit(lambda q, k, v, plan: sparse_attention(q, k, v, plan, implementation=implementation))
    error = largest_error(attend(*arrays, plan), arrays, plan)
    if not error <= LARGEST_ERROR:
        raise RuntimeError(f"{case} at {length} tokens is wrong: relative error {error:.1e} of sampled rows")
    choice = choose_implementation(*arrays, plan, implementation=implementation)
    return _Checked(case, plan, choice, lambda: attend(*arrays, plan), error)


def _row(checked: _Checked, layout, arrays, attend_ms, dense_ms, peers, repeats) -> Row:
    case, plan, choice, _, error = checked
    q, k, _ = arrays
    estimate = jax.jit(lambda q, k: make_plan(q, k, case.estimator()))
    planned = float("nan")
    if (prepare := choice.backend.prepare) is not None:
        tables = jax.jit(lambda q, k, v, p: prepare(p, q, k, v, lengths=None, q_offset=jnp.int32(0)))
        planned = median_ms(lambda: tables(*arrays, plan), repeats)
    length = q.shape[1]
    density = float(jnp.mean(plan.density(length, length)))
    operations = 4 * layout.head_dim * layout.batch * layout.heads * length * (length + 1) / 2
    return Row(
        pattern=str(case),
        layout=str(layout),
        length=length,
        density=density,
        estimate_ms=median_ms(lambda: estimate(q, k), repeats),
        plan_ms=planned,
        attend_ms=attend_ms,
        tflops=operations * density / attend_ms / 1e9,
        dense_ms=dense_ms,
        dense_tflops=operations / dense_ms / 1e9,
        ratio=dense_ms / attend_ms,
        error=error,
        implementation=choice.name,
        peers=peers,
    )


def largest_error(out: Float[Array, "b t n h"], arrays: others.Arrays, plan: SparsePlan) -> float:
    """Largest relative error of sampled rows of the first sequence, against an exact computation of them."""
    errors = []
    for head, row in sample_rows(out.shape[1], out.shape[2], count=6):
        expected, _ = exact_row(arrays, plan, 0, head, row)
        actual = np.asarray(out[0, row, head], np.float64)
        errors.append(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    return float(max(errors))


def table(rows: Sequence[Row]) -> Table:
    """The rows as a rich table, under the facts of `environment()`."""
    with naming_extra("a table"):
        from rich.table import Table

    titles = ("pattern", "heads", "tokens", "density", "index,ms", "plan,ms", "attend,ms", "TF/s")
    titles += ("dense,ms", "dense,TF/s", "speed-up", "error")
    facts = " ".join(f"{name}={value}" for name, value in environment().items())
    shown = Table(*(title.replace(",", "\n") for title in titles), title=facts, caption="attend includes plan")
    for r in rows:
        first = (r.pattern, r.layout, f"{r.length:,}", f"{r.density:.3f}", f"{r.estimate_ms:.2f}", f"{r.plan_ms:.2f}")
        dense = (f"{r.dense_ms:.1f}", f"{r.dense_tflops:.0f}", f"{r.ratio:.1f}")
        shown.add_row(*first, f"{r.attend_ms:.2f}", f"{r.tflops:.0f}", *dense, f"{r.error:.0e}")
    return shown


def peer_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each other implementation that was timed, or the reason why it was not."""
    return [
        f"{r.pattern}, {r.layout}, {r.length:,}: {name}: {value if isinstance(value, str) else f'{value:.2f} ms'}"
        for r in rows
        for name, value in r.peers.items()
    ]


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The environment and all rows, as JSON values."""
    return {"environment": environment(), "rows": [dataclasses.asdict(r) for r in rows]}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time against length for every pattern and layout, and dense, both axes logarithmic, as an image file.

    Raises ModuleNotFoundError without matplotlib.
    """
    with naming_extra("a plot"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for layout in dict.fromkeys(r.layout for r in rows):
        same = [r for r in rows if r.layout == layout]
        for pattern in dict.fromkeys(r.pattern for r in same):
            mine = [r for r in same if r.pattern == pattern]
            axes.plot([r.length for r in mine], [r.attend_ms for r in mine], marker="o", label=f"{pattern} {layout}")
        dense = {r.length: r.dense_ms for r in same}
        axes.plot(list(dense), list(dense.values()), "k--", marker="s", label=f"dense, cuDNN {layout}")
    axes.set(yscale="log", xlabel="tokens", ylabel="attention, ms", title=environment()["device"])
    axes.set_xscale("log", base=2)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
