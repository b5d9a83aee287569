"""`bench kernels`: cases by name, a table and JSON, and no figure for a wrong output."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.bench import kernels, shapes, timing
from minference_jax.bench.cases import Case
from minference_jax.cli import main

TINY = Case.parse("vertical-slash:columns=20,window=64,clusters=1")


def test_cases_are_read_by_name():
    case = Case.parse("a-shape:sink=3,window=7")
    assert str(case) == "a-shape:sink=3,window=7" and case.values() == {"sink": 3, "window": 7}
    assert Case.parse("block-sparse").values() == {"blocks": 100}


@pytest.mark.parametrize(
    "text, message",
    [("diagonal", "unknown pattern 'diagonal'"), ("a-shape:tail=3", "no budget 'tail'"), ("a-shape:sink=x", "number")],
)
def test_bad_cases_say_why(text, message):
    with pytest.raises(ValueError, match=message):
        Case.parse(text)


def test_head_layouts():
    assert kernels.Layout.parse("4/2/64", batch=3) == kernels.Layout(3, 4, 2, 64)
    for bad in ("4/2", "4/3/64", "4/0/64", "a/b/c"):
        with pytest.raises(ValueError, match="no head layout"):
            kernels.Layout.parse(bad)


def test_rows_that_are_checked_are_those_of_the_plan():
    """`visible_keys` is written apart from every implementation; the plan's own mask must agree with it."""
    plan = TINY.plan(1, 2, 400)
    mask = np.asarray(plan.to_mask(400, 400))
    for head, row in shapes.sample_rows(400, 2, count=8):
        np.testing.assert_array_equal(shapes.visible_keys(plan, 0, head, row, 400), mask[0, head, row])


def test_functions_are_timed_in_turns():
    calls = []
    times = timing.in_turns_ms([lambda name=name: calls.append(name) for name in "ab"], turns=2, seconds=0)
    assert "".join(calls) == "aabb" + "abab"  # a warm-up and a first call each, then the turns
    assert len(times) == 2 and min(times) > 0


def test_a_wrong_output_gets_no_figure(monkeypatch):
    monkeypatch.setattr(kernels, "sparse_attention", lambda q, k, v, plan, implementation: jnp.zeros_like(q))
    with pytest.raises(RuntimeError, match="is wrong: relative error"):
        list(kernels.bench_kernels([256], [TINY], [kernels.Layout(1, 2, 1, 64)], repeats=1))


def test_command_prints_one_json_object(capsys, tmp_path):
    plot = tmp_path / "plot.png"
    arguments = "--lengths 256 --heads 2/1/64 --repeats 1 --pattern a-shape:sink=8,window=64 --peers --json --plot"
    assert main(["bench", "kernels", *arguments.split(), str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert row["implementation"] == "xla" and row["error"] < kernels.LARGEST_ERROR and row["attend_ms"] > 0
    assert row["density"] == pytest.approx(
        float(Case.parse("a-shape:sink=8,window=64").plan(1, 2, 256).density(256, 256)[0, 0])
    )
    assert "minference" in row["peers"]["minference, one launch"]  # why it could not be timed
    assert plot.stat().st_size > 0


def test_command_times_the_implementation_that_is_asked_for(capsys):
    arguments = "--lengths 256 --heads 2/1/64 --repeats 1 --pattern a-shape:sink=8,window=64 --json --implementation"
    assert main(["bench", "kernels", *arguments.split(), "reference"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["implementation"] == "reference"
    assert main(["bench", "kernels", *arguments.split(), "fastest"]) == 2
    assert "got 'fastest'" in capsys.readouterr().err


def test_command_names_bad_options(capsys):
    assert main(["bench", "kernels", "--pattern", "diagonal"]) == 2
    assert "unknown pattern" in capsys.readouterr().err
