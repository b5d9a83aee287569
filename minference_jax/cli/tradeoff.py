"""`bench tradeoff`: speed-up against answers lost, from what `eval` and `bench operator` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from minference_jax.cli.console import check_picture, print_json, read_rows, show_table, usage, usage_error


def tradeoff(
    results: Annotated[
        list[Path] | None, typer.Option(help="A folder of eval, or its results.jsonl; may be repeated.")
    ] = None,
    operator: Annotated[
        list[Path] | None,
        typer.Option(help="What bench operator --json printed; may be repeated."),
    ] = None,
    rows_of: Annotated[
        Path | None,
        typer.Option("--rows", exists=True, dir_okay=False, help="Instead: show what --json printed before."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture as an image (needs matplotlib).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put speed-up of attention beside RULER points lost: a line for each pattern, a panel for each length.

    Nothing is measured here. Answers are of eval with tasks of RULER and dense among its methods, times of bench
    operator with the same patterns and lengths.

    Example: minference-jax bench tradeoff --results eval --operator operator.json --plot tradeoff.png
    """
    if (rows_of is None) != bool(results and operator) or (rows_of and (results or operator)):
        raise usage_error("give --results and --operator, or --rows")
    from minference_jax.bench import tradeoff as bench

    if plot is not None:
        check_picture("--plot", plot)
    found = read_rows(rows_of) if rows_of is not None else _joined(results or [], operator or [])
    points = bench.from_json(found)
    if json:
        print_json(found)
    else:
        show_table(bench.table(points, found["environment"]))
    if plot is not None:
        from minference_jax.bench.tradeoff_plot import draw, title
        from minference_jax.viz.figure import save

        save(draw(points, title(found)), plot)


def _joined(results: list[Path], operator: list[Path]) -> dict[str, Any]:
    """The points of files. Ends with status 2 for files that do not fit each other."""
    from minference_jax.bench import operator as whole
    from minference_jax.bench import tradeoff as bench
    from minference_jax.bench.tradeoff_points import make_points
    from minference_jax.eval.results import read_results

    with usage("--results"):
        runs = [read_results(path / "results.jsonl" if path.is_dir() else path) for path in results]
    rows, environments = [], []
    for path in operator:
        before = read_rows(path)
        with usage(f"--operator {path}"):
            rows += whole.from_json(before)
        environments.append(before["environment"])
    with usage("--results and --operator"):
        return bench.to_json(make_points(runs, rows), runs, rows, environments)
