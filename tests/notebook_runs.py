"""Runs the notebooks and writes them with their outputs: `python tests/notebook_runs.py [NAME ...]`.

The source of a notebook is its .py file (jupytext); the .ipynb beside it is what this script made of it, so that
pictures can be seen where the repository is browsed. tests/test_notebooks.py runs them the same way and compares.
"""

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
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
VOLATILE = re.compile(r"0x[0-9a-f]+|\b\d+(\.\d+){2,}\S*|[\d.,]+ (ms|s|seconds)\b")
"""What differs from run to run: addresses, versions, times."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@contextmanager
def kernel() -> Iterator[KernelManager]:
    """One Jupyter kernel for several notebooks, so that JAX is imported once."""
    computed_for_long = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "PYTHONWARNINGS": "ignore"}
    manager, client = start_new_kernel(env=os.environ | computed_for_long)
    client.stop_channels()
    try:
        yield manager
    finally:
        manager.shutdown_kernel(now=True)


def executed(source: Path, manager: KernelManager) -> NotebookNode:
    """The notebook of `source` (.py), run from its first cell to the last, with its outputs."""
    notebook = jupytext.read(source)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # nothing is left of the notebook before
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


if __name__ == "__main__":
    with kernel() as running:
        for path in SOURCES:
            if not sys.argv[1:] or path.stem in sys.argv[1:]:
                print(path.stem)
                nbformat.write(executed(path, running), path.with_suffix(".ipynb"))
