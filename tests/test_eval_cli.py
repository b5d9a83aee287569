"""The `eval` command on a tiny model with a real tokenizer: results, report, going on, and wrong arguments."""

import json

import pytest
from smollm2 import tiny_with_tokenizer

from minference_jax.cli import main
from minference_jax.cli.eval import split_methods


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_with_tokenizer(tmp_path_factory.mktemp("tiny") / "model"))


def test_eval_writes_results_and_report_and_goes_on(tiny, tmp_path, capsys):
    command = ["eval", "--model", tiny, "--tasks", "needle-magic-raw,ppl", "--lengths", "200", "--methods", "dense"]
    command += ["--samples", "2", "--batch", "2", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "200 tokens" in first.out and "dense" in first.out and "report.md" in first.err
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert lines[0]["about"]["model"] == "model" and len(lines) == 1 + 2 * 2
    report = (tmp_path / "out" / "report.md").read_text()
    assert main(command) == 0
    assert (tmp_path / "out" / "report.md").read_text() == report and "| dense | 1.000 |" in report


@pytest.mark.parametrize(
    "changed, status, message",
    [
        (["--tasks", "nothing"], 2, "no task is named 'nothing'"),
        (["--lengths", "1024,x"], 2, "--lengths must be lengths with commas"),
        (["--data", "mine.jsonl"], 2, "--data needs --template and --answer"),
        (["--choices", "a,b"], 2, "--choices has no effect without --data"),
        (["--methods", "best"], 2, "'best' is neither a file nor a pattern"),
        (["--methods", "searched:dense"], 2, "no budgets to scale"),
    ],
)
def test_wrong_arguments_are_named(tiny, tmp_path, capsys, changed, status, message):
    command = ["eval", "--model", tiny, "--tasks", "ppl", "--lengths", "200", "--output", str(tmp_path / "out")]
    assert main([*command, *changed]) == status
    assert message in capsys.readouterr().err


def test_commas_between_the_fields_of_a_pattern_do_not_split_it():
    text = "dense, vertical-slash:columns=64,tiles=16,searched:x.json"
    assert split_methods(text) == ["dense", "vertical-slash:columns=64,tiles=16", "searched:x.json"]
