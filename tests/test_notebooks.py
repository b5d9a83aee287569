"""Notebooks: the pair of each is in step and without outputs, and all its code runs, on few tokens."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from smollm2 import smollm2_directory
from torch_env import torch_python

jupytext = pytest.importorskip("jupytext")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
SMALL = {"NOTEBOOK_TOKENS": "256", "NOTEBOOK_LENGTHS": "256", "NOTEBOOK_SAMPLES": "2", "MPLBACKEND": "Agg"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_its_source_without_outputs(path):
    source, notebook = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 3 and all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.cells[0].source.startswith(f"# {path.name[:2]} · ")


@pytest.fixture(scope="module")
def runs():
    """All notebooks' code as scripts, as users run them, two at a time: path → finished process."""

    def run(path: Path) -> subprocess.CompletedProcess:
        environment = (
            os.environ
            | SMALL
            | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "MINFERENCE_CACHE": str(smollm2_directory().parent)}
        )
        command = [sys.executable, "-W", "ignore", str(path)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)

    smollm2_directory()  # skips when offline
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(run, path) for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path, runs):
    if "pytorch" in path.stem:
        torch_python()  # skips where there is none
    done = runs[path].result()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
