"""The kernels of the `minference` package (PyTorch, Triton, CUDA) on the index of a benchmark case, where installed.

They take `[b, n, t, h]` and one KV head per query head. As the package runs them is a Python loop over heads; with all
heads in one launch is what its kernels can do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minference_jax.bench.cases import Case
from minference_jax.bench.shapes import vertical_slash_bench_index
from minference_jax.bench.timing import median_ms
from minference_jax.extras import naming_extra


def one_launch(case: Case, shape: tuple[int, int, int, int], repeats: int = 5) -> float:
    """Milliseconds of the official kernel with all heads in one launch.

    **Arguments:** `shape`: (b, t, n, h) of the queries.

    **Raises:** ImportError without the package, ValueError for A-shape, whose kernel is not one of an index.
    """
    run, arrays = _prepared(case, shape)
    return _timed(lambda: run(*arrays), repeats)


def loop_over_heads(case: Case, shape: tuple[int, int, int, int], repeats: int = 5) -> float:
    """Milliseconds of the official kernel called for one head at a time, as the package does. As `one_launch`."""
    run, arrays = _prepared(case, shape)
    heads = [[x[:, head : head + 1] for x in arrays] for head in range(shape[2])]
    return _timed(lambda: [run(*one) for one in heads], repeats)


def _prepared(case: Case, shape: tuple[int, int, int, int]) -> tuple[Callable[..., Any], list[Any]]:
    import minference  # pyright: ignore[reportMissingImports]

    with naming_extra("the official kernel"):
        import torch  # pyright: ignore[reportMissingImports]

    b, t, n, h = shape
    q, k, v = (torch.randn((b, n, t, h), dtype=torch.bfloat16, device="cuda") for _ in range(3))
    budgets = case.values()
    if case.pattern == "block-sparse":
        return lambda q, k, v: minference.block_sparse_attention(q, k, v, budgets["blocks"]), [q, k, v]
    if case.pattern == "a-shape":
        raise ValueError("the official A-shape kernel takes no index")
    columns, lines = (torch.from_numpy(x).cuda() for x in vertical_slash_bench_index(b, n, t, **budgets))
    return minference.vertical_slash_sparse_attention, [q, k, v, columns, lines]


def _timed(run: Callable[[], Any], repeats: int) -> float:
    with naming_extra("the official kernel"):
        import torch  # pyright: ignore[reportMissingImports]

    def finished() -> None:
        run()
        torch.cuda.synchronize()

    return median_ms(finished, repeats)


SPARSE_PEERS = {"minference, one launch": one_launch, "minference, loop over heads": loop_over_heads}
"""Name → timing function of the official kernels on the index of a case."""
