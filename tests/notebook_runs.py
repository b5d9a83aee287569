"""Runs notebooks and writes them with their outputs: `python tests/notebook_runs.py [--out FOLDER] [NAME ...]`.

The source of a notebook is its .py file (jupytext); the .ipynb beside it is what this script made of it, so that
pictures can be seen where the repository is browsed. tests/test_notebooks.py runs them the same way and compares.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
VOLATILE = re.compile(r"0x[0-9a-f]+|\b\d+(\.\d+){2,}\S*|[\d.,]+ (ms|s|seconds)\b")
"""What differs from run to run: addresses, versions, times."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


COMPUTING = ("03", "05", "06")
"""Notebooks that take longer to compute than to compile."""
BEFORE = """%reset -f
import jax
jax.config.update("jax_disable_most_optimizations", {})
del jax"""
"""Nothing is left of the notebook before."""


@contextmanager
def kernel() -> Iterator[KernelManager]:
    """One Jupyter kernel for several notebooks, so that JAX is imported once."""
    manager, client = start_new_kernel(env=os.environ | {"PYTHONWARNINGS": "ignore"})
    client.stop_channels()
    try:
        yield manager
    finally:
        manager.shutdown_kernel(now=True)


def executed(source: Path, manager: KernelManager) -> NotebookNode:
    """The notebook of `source` (.py), run from its first cell to the last, with its outputs."""
    notebook = jupytext.read(source)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(BEFORE.format(source.name[:2] not in COMPUTING)))
    NotebookClient(notebook, km=manager, timeout=500, resources={"metadata": {"path": str(FOLDER)}}).execute()
    del notebook.cells[0]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{source.name[:2]}-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [kept(output) for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def kept(output: NotebookNode) -> NotebookNode:
    """An output without what changes from run to run and says nothing."""
    if "execution_count" in output:
        output.execution_count = None
    return output


def text(cell: NotebookNode) -> str:
    """What the outputs of a cell say, without pictures, addresses, versions and times."""
    parts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return VOLATILE.sub("…", "\n".join(parts)).strip()


def differences(fresh: str, committed: str) -> list[str]:
    """Lines that say something else: other words, or numbers more than two in a hundred apart (CPUs round unlike)."""
    found = []
    lines = fresh.splitlines(), committed.splitlines()
    for one, other in zip(*lines, strict=False):
        numbers = [[float(number) for number in NUMBER.findall(line)] for line in (one, other)]
        near = all(abs(a - b) <= 0.02 * max(abs(a), abs(b), 1) for a, b in zip(*numbers, strict=False))
        if not (near and NUMBER.sub("#", one).split() == NUMBER.sub("#", other).split()):
            found.append(f"fresh: {one}\ncommitted: {other}")
    return found + [f"fresh has {len(lines[0])} lines, not {len(lines[1])}"] * (len(lines[0]) != len(lines[1]))


def main() -> int:
    """Exit status 1 where a cell failed; the other notebooks are run all the same."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("names", nargs="*", default=[path.stem for path in SOURCES])
    options, failed = parser.parse_args(), 0
    with kernel() as running:
        for name in options.names:
            print(name, flush=True)
            try:
                nbformat.write(executed(FOLDER / f"{name}.py", running), options.out / f"{name}.ipynb")
            except CellExecutionError as error:
                print(f"{name}: {error}", file=sys.stderr)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
