"""Times the online index on this machine's GPU: whole index, and its extra memory, for the shapes of Llama-3-8B.

Run as `python -m minference_jax.bench.index`. Random inputs, warm-up, median of the runs, whole-call wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from minference_jax.attention import make_plan
from minference_jax.patterns import BlockSparse, Pattern, VerticalSlash

PATTERNS: dict[str, Pattern] = {
    "lines (1000, 6096)": VerticalSlash(),
    "tiles (1000, 128), last": VerticalSlash(columns=1000, tiles=128),
    "tiles (1000, 128), spread": VerticalSlash(columns=1000, tiles=128, probes="spread"),
    "tiles, spread, coverage 0.95": VerticalSlash(columns=1000, tiles=128, probes="spread", coverage=0.95),
    "block-sparse 100": BlockSparse(100),
}


class Row(NamedTuple):
    """One line of the table: milliseconds, MiB of temporary and result memory, seconds to compile."""

    tokens: int
    pattern: str
    ms: float
    extra_mib: float
    compile_s: float


def index_times(
    tokens: int, *, heads: int = 32, kv_heads: int = 8, head_dim: int = 128, runs: int = 7
) -> Iterator[Row]:
    """Yields a row for each pattern of `PATTERNS` at batch 1, bfloat16."""
    key_q, key_k = jax.random.split(jax.random.key(0))
    q = jax.random.normal(key_q, (1, tokens, heads, head_dim), jnp.bfloat16)
    k = jax.random.normal(key_k, (1, tokens, kv_heads, head_dim), jnp.bfloat16)
    for name, pattern in PATTERNS.items():
        start = time.perf_counter()
        compiled = jax.jit(lambda q, k, pattern=pattern: make_plan(q, k, pattern)).lower(q, k).compile()
        compile_s = time.perf_counter() - start
        memory: Any = compiled.memory_analysis()
        extra = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
        jax.block_until_ready(compiled(q, k))
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            jax.block_until_ready(compiled(q, k))
            times.append(1e3 * (time.perf_counter() - start))
        yield Row(tokens, name, statistics.median(times), extra, compile_s)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072, 1048576])
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; 32 query heads, 8 KV heads, head_dim 128, bfloat16")
    for tokens in arguments.tokens:
        for row in index_times(tokens):
            print(
                f"{row.tokens:>8} {row.pattern:<30} {row.ms:8.2f} ms {row.extra_mib:8.0f} MiB  compiled in "
                f"{row.compile_s:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
