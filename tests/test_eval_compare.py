"""`compare --task`: both sides' replies scored, against PyTorch and by hand-made continuations."""

import dataclasses
import json

import pytest
from eval_tokenizer import WordTokenizer
from smollm2 import tiny_with_tokenizer
from torch_env import torch_python

from minference_jax.cli import main
from minference_jax.compare import Comparison, Tolerance
from minference_jax.compare.task import TaskComparison, judge, task_table, until_end
from minference_jax.eval.retrieval import HiddenNumber
from minference_jax.eval.samples import Sample


def comparison(ours, theirs) -> Comparison:
    numbers = {field.name: 0.0 for field in dataclasses.fields(Comparison) if field.type in ("float", float)}
    return Comparison(
        **numbers | {"perplexity_ours": 2.0, "perplexity_torch": 2.0, "argmax_agreement": 1.0},
        model="m",
        dtype="float32",
        patterns=None,
        tokens=9,
        positions=3,
        layers=(),
        seconds_ours={},
        seconds_torch={},
        versions={},
        tolerance=Tolerance(),
        greedy_ours=ours,
        greedy_torch=theirs,
    )


def test_replies_are_scored_up_to_their_end():
    tokenizer = WordTokenizer()
    right, wrong = tokenizer.encode(" 12345. And more"), tokenizer.encode(" 99999 and no more")
    ours = ((*right[:6], 0, 5), tuple(wrong[:8]))
    theirs = ((*right[:6], 0, 7), tuple(right[:8]))
    prompts = [Sample("passkey", 100, i, (1, 2), ("12345",), 8) for i in range(2)]
    result = judge(HiddenNumber("passkey"), 100, prompts, comparison(ours, theirs), tokenizer)
    assert (result.scores_ours, result.scores_torch, result.same_replies) == ((1.0, 0.0), (1.0, 1.0), 0.5)
    assert result.replies_ours[0] == " 12345" and until_end([1, 2], (0,)) == [1, 2]
    assert json.loads(json.dumps(result.to_dict()))["comparison"]["model"] == "m"
    from rich.console import Console

    console = Console(record=True, width=100)
    console.print(task_table(result))
    text = console.export_text()
    assert "passkey, 100 tokens" in text and "50.0" in text and "100.0" in text


def test_a_task_scores_as_pytorch_does(tmp_path, capsys):
    """The command, on random weights with a real tokenizer: replies and scores of both sides are the same."""
    model = tiny_with_tokenizer(tmp_path / "model")
    page = tmp_path / "page.html"
    options = ["--model", str(model), "--torch-python", str(torch_python()), "--json", "--report", str(page)]
    assert main(["compare", "--task", "needle-magic-raw", "--length", "200", "--samples", "2", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {field.name for field in dataclasses.fields(TaskComparison)}
    assert found["scores_ours"] == found["scores_torch"] and found["same_replies"] == 1.0
    assert "100 % of 2 replies are the same" in page.read_text()
    assert found["replies_ours"] == found["replies_torch"] and all(found["replies_ours"])
    assert found["comparison"]["argmax_agreement"] > 0.99


@pytest.mark.parametrize(
    "arguments, status, message",
    [([], 2, "give --text or --task"), (["--task", "niah"], 1, "niah is a group of tasks")],
)
def test_wrong_tasks_are_refused(tmp_path, capsys, arguments, status, message):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}).replace(
            "}", ', "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}'
        )
    )
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert main(["compare", "--model", str(tmp_path), *arguments]) == status
    assert message in capsys.readouterr().err
