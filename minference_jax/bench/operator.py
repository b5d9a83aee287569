"""Times the whole operator of a pattern (index, tables and kernel, as a user calls it) beside dense attention.

A kernel's rate says nothing about an index that costs more than it saves. Here `sparse_attention(q, k, v, pattern)` is
one call, and its parts are also timed by themselves. All of them and cuDNN take turns (`bench.timing`), so the ratios
of one run hold; queries, keys and values are random, or those of a layer of a model over a text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from minference_jax.attention import make_plan, sparse_attention
from minference_jax.bench import peers
from minference_jax.bench.kernels import environment
from minference_jax.bench.timing import in_turns_ms
from minference_jax.extras import naming_extra
from minference_jax.patterns import Pattern
from minference_jax.patterns.text import as_pattern, format_pattern
from pallas_kernels import choose_implementation, dense_attention
from pallas_kernels import sparse_attention as attend_to_plan

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class OperatorRow:
    """One line of the table. Times in milliseconds; each part is a program of its own, so they need not add up.

    `density`: visited / causal cells. `index_ms`: of `make_plan`. `tables_ms`: what the kernel makes of a plan before
    it runs. `attend_ms`: attention over a given plan, tables included. `whole_ms`: the operator. `ratio`: dense time
    over `whole_ms`.
    """

    pattern: str
    inputs: str
    length: int
    density: float
    index_ms: float
    tables_ms: float
    attend_ms: float
    whole_ms: float
    dense_ms: float
    ratio: float
    implementation: str


def time_operators(
    arrays: peers.Arrays, patterns: Sequence[Pattern | str], *, inputs: str, turns: int = 5
) -> Iterator[OperatorRow]:
    """A row for each pattern, on one q `[b, t, n, h]`, k and v `[b, s, k, h]`.

    `inputs`: what the arrays are, for the table. Dense attention is cuDNN's on a GPU, else the best dense backend.
    """
    best = jax.jit(lambda q, k, v: dense_attention(q, k, v))
    dense = peers.cudnn_dense(arrays) if jax.default_backend() == "gpu" else partial(best, *arrays)
    for pattern in patterns:
        yield _time(arrays, as_pattern(pattern), dense, inputs, turns)


def _time(arrays: peers.Arrays, pattern: Pattern, dense: Callable[[], Any], inputs: str, turns: int) -> OperatorRow:
    q, k, v = arrays
    # Arrays are arguments, never closed over: constants of this size would be copied into the program.
    index = jax.jit(lambda q, k: make_plan(q, k, pattern))
    whole = jax.jit(lambda q, k, v: sparse_attention(q, k, v, pattern))
    attend = jax.jit(lambda q, k, v, plan: attend_to_plan(q, k, v, plan))
    plan = index(q, k)
    choice = choose_implementation(q, k, v, plan)
    runs = [dense, partial(whole, q, k, v), partial(index, q, k), partial(attend, q, k, v, plan)]
    if choice.backend.prepare is not None:
        prepare = partial(choice.backend.prepare, lengths=None, q_offset=jnp.int32(0))
        runs.append(partial(jax.jit(prepare), plan, q, k, v))
    dense_ms, whole_ms, index_ms, attend_ms, *tables_ms = in_turns_ms(runs, turns)
    return OperatorRow(
        pattern=format_pattern(pattern),
        inputs=inputs,
        length=q.shape[1],
        density=float(jnp.mean(plan.density(q.shape[1], k.shape[1]))),
        index_ms=index_ms,
        tables_ms=sum(tables_ms),
        attend_ms=attend_ms,
        whole_ms=whole_ms,
        dense_ms=dense_ms,
        ratio=dense_ms / whole_ms,
        implementation=choice.name,
    )


def table(rows: Sequence[OperatorRow]) -> Table:
    """The rows as a rich table, under the facts of `environment()`."""
    with naming_extra("a table"):
        from rich.table import Table

    titles = ("pattern", "inputs", "tokens", "density", "index,ms", "tables,ms", "attend,ms", "whole,ms", "dense,ms")
    facts = " ".join(f"{name}={value}" for name, value in environment().items())
    shown = Table(*(title.replace(",", "\n") for title in (*titles, "speed-up")), title=facts)
    for r in rows:
        times = (r.index_ms, r.tables_ms, r.attend_ms, r.whole_ms, r.dense_ms, r.ratio)
        first = (f"{r.pattern} ({r.implementation})", r.inputs, f"{r.length:,}", f"{r.density:.3f}")
        shown.add_row(*first, *(f"{value:.2f}" for value in times))
    return shown


def captured(model: Any, tokens: Any, layer: int) -> peers.Arrays:
    """Queries, keys and values of one layer of a `Llama` over a prompt `[1, t]`, in 16 bits on a GPU."""
    from minference_jax.models.capture import capture_qkv

    check_layer(model.config, layer)
    return next(qkv for index, qkv in enumerate(capture_qkv(model, tokens)) if index == layer)


def check_layer(config: Any, layer: int) -> None:
    """Raises `ValueError` where a model of this config has no such layer."""
    if not 0 <= layer < config.num_layers:
        raise ValueError(f"layer must be in 0 … {config.num_layers - 1}, got {layer}")


def to_json(rows: Sequence[OperatorRow]) -> dict[str, Any]:
    """The environment and all rows, as JSON values."""
    return {"environment": environment(), "rows": [dataclasses.asdict(r) for r in rows]}


def from_json(found: Mapping[str, Any]) -> list[OperatorRow]:
    """The rows of what `to_json` gave. Raises `ValueError` naming the row and the field that is none of theirs."""
    rows = []
    for number, fields in enumerate(found["rows"], 1):
        try:
            row = OperatorRow(**fields)
            if not isinstance(row.length, int):
                raise ValueError(f"length is {row.length!r}, no whole number")
            for name in ("density", "whole_ms", "dense_ms"):
                value = getattr(row, name)
                if not isinstance(value, int | float) or not 0 < value < math.inf:
                    raise ValueError(f"{name} is {value!r}, no number above 0")
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {number} is none of bench operator: {error}") from None
        rows.append(row)
    return rows
