"""`bench operator`: the whole operator of any pattern, on random inputs and on those of a model."""

import json

import pytest

from minference_jax.cli import main


def test_whole_operator_is_timed_beside_its_parts(capsys):
    pattern = "a-shape:sink=8,window=64"
    command = ["bench", "operator", "--pattern", pattern, "--lengths", "256", "--heads", "2/1/16", "--repeats", "1"]
    assert main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["pattern"], row["length"], row["implementation"]) == (pattern, 256, "xla")
    assert 0.5 < row["density"] < 1 and row["ratio"] == pytest.approx(row["dense_ms"] / row["whole_ms"])
    assert main([*command[:-4], "--heads", "3/2/16"]) == 2
    assert "3/2/16" in capsys.readouterr().err
