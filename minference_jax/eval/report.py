"""Results as files: Markdown, one HTML page, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minference_jax.eval.page import html_page
from minference_jax.eval.results import Result, unlike_densities
from minference_jax.eval.tables import NOTE, tables
from minference_jax.runs.files import naming
from minference_jax.viz.figure import has_matplotlib
from minference_jax.viz.page import to_svg


def markdown(results: Sequence[Result], title: str = "Evaluation") -> str:
    """The report as Markdown."""
    notes = [line for text in (NOTE, *unlike_densities(results)) for line in (text, "")]
    return "\n".join([f"## {title}", "", *notes, *(table.markdown() for table in tables(results))])


def write_report(
    results: Sequence[Result], directory: str | Path, title: str = "Evaluation", run: Mapping[str, Any] | None = None
) -> list[Path]:
    """Writes `report.md`, `report.html` and, where matplotlib is installed, one SVG file for each picture.

    `run`: what the page says of the run, such as `results.read_run` reads it: command, date, versions, settings.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {}
    if has_matplotlib():
        from minference_jax.eval.plots import figures

        pictures = {name: to_svg(figure) for name, figure in figures(results).items()}
    texts = {f"{name}.svg": svg for name, svg in pictures.items()}
    texts |= {"report.md": markdown(results, title), "report.html": html_page(results, title, pictures, run or {})}
    for name, text in texts.items():
        with naming(directory / name):
            (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in texts]
