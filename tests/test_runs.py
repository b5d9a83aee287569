"""What kept results belong to, and one process at a time."""

import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from minference_jax.eval.results import Result, ResultFile, score_cell
from minference_jax.runs.files import check_output_file, check_output_folder
from minference_jax.runs.identity import content_digest, weights_digest
from minference_jax.runs.lock import LockedError, locked

HOLD = """
import sys, time
from minference_jax.runs.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_with_the_id_of_the_first_and_a_killed_one_blocks_nobody(tmp_path):
    path = tmp_path / "out.jsonl"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"in use by process {holder.pid}"), locked(path):
            pass
        said = []
        holder.kill()
        holder.wait()
        assert (tmp_path / "out.jsonl.lock").exists()
        with locked(path, wait=True, say=said.append):
            assert (tmp_path / "out.jsonl.lock").read_text().split()[0] == str(os.getpid())
        assert said == [] and not (tmp_path / "out.jsonl.lock").exists()


def test_a_sample_counts_once_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    two = [ResultFile(path, {"seed": 1}) for _ in range(2)]
    for file in two:
        file.append([Result("dense", "kv", 256, i, score=float(i % 2)) for i in range(6)])
    whole = path.read_text()
    cell = score_cell(ResultFile(path, {"seed": 1}).results)
    assert cell is not None and cell.count == 6
    path.write_text(whole + whole)  # two files of one run, one after the other
    assert len(ResultFile(path, {"seed": 1}).results) == 6
    for broken in ('{"method": "dense"}', "[1]", '{"settings": {"seed": 2}}', "x", '{"method": 1}'):
        path.write_text(whole + broken + "\n")
        with pytest.raises(ValueError, match="line 14"):
            ResultFile(path, {"seed": 1})


def test_weights_and_contents_are_told_apart_by_one_number():
    weights = {"a": jnp.zeros((3, 5), jnp.bfloat16), "b": jnp.ones((4,))}
    changed = weights | {"a": weights["a"].at[2, 1].set(1e-3)}
    moved = weights | {"b": weights["b"].at[1].set(2.0)}, weights | {"b": weights["b"].at[2].set(2.0)}
    assert len({weights_digest(w) for w in (weights, changed, *moved)}) == 4
    assert weights_digest(dict(weights)) == weights_digest(weights)

    def made(number):
        return lambda: number

    assert content_digest([made(1), {"x": "y"}]) == content_digest([made(1), {"x": "y"}])
    assert len({content_digest(x) for x in (made(1), made(2), [1], [1.0], ["1"], {1: 1}, None)}) == 7


def test_outputs_are_looked_at_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in ((tmp_path, "is a directory"), (tmp_path / "no" / "x", "is no directory")):
        with pytest.raises(ValueError, match=message):
            check_output_file(path)
    with pytest.raises(ValueError, match="is a file"):
        check_output_folder(tmp_path / "file" / "folder")
    check_output_folder(tmp_path / "new" / "folder")
