"""Notebooks: the pair of each is in step, and a fresh run says what the committed outputs say."""

import os
import subprocess
import sys

import pytest
from smollm2 import smollm2_directory
from torch_env import torch_python

notebook_runs = pytest.importorskip("notebook_runs")  # needs the extra `notebooks`
pytest.importorskip("matplotlib")

SOURCES = notebook_runs.SOURCES
LARGEST_PICTURE = 150_000 * 4 // 3
"""Characters of base64."""


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def committed(path):
    return notebook_runs.nbformat.read(path.with_suffix(".ipynb"), as_version=4)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_notebook_is_its_source_with_outputs(path):
    source, notebook = notebook_runs.jupytext.read(path), committed(path)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ]
    assert notebook.cells[0].source.startswith(f"# {path.name[:2]} · ")
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures and max(map(len, pictures)) < LARGEST_PICTURE
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A folder with all notebooks as a fresh run leaves them, and what the run said of cells that failed."""
    environment = os.environ | {"MINFERENCE_CACHE": str(smollm2_directory().parent)}  # skips when offline
    folder = tmp_path_factory.mktemp("notebooks")
    command = [sys.executable, notebook_runs.__file__, "--out", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    return folder, done.stderr


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_fresh_run_says_the_same(path, fresh):
    folder, errors = fresh
    if "pytorch" in path.stem:
        torch_python()  # skips where there is none
    again = folder / path.with_suffix(".ipynb").name
    assert again.exists(), errors[-3000:]
    for cell, new in zip(code(committed(path)), code(committed(again)), strict=True):
        assert notebook_runs.differences(notebook_runs.text(new), notebook_runs.text(cell)) == [], cell.source
        kinds, expected = ([sorted(output.get("data", {})) for output in one.outputs] for one in (new, cell))
        assert kinds == expected


def test_words_and_numbers_are_compared_but_not_what_changes_from_run_to_run():
    before = "<Axes at 0x7f12ab>\nJAX 0.11.2, 12 heads: recall 0.953 in 3.2 ms"
    assert notebook_runs.differences(clean := notebook_runs.VOLATILE.sub("…", before), clean) == []
    assert notebook_runs.VOLATILE.sub("…", "at 0x12 took 1,204.5 s, jax 0.12.1.dev3") == "at … took …, jax …"
    assert notebook_runs.differences("recall 0.95", "recall 0.96") == []
    assert notebook_runs.differences("recall 0.95", "recall 0.85") == ["fresh: recall 0.95\ncommitted: recall 0.85"]
    assert notebook_runs.differences("recall 0.95", "density 0.95") and notebook_runs.differences("a\nb", "a")
