"""Rows of a user's own file as a task: prompts, answers, metrics, choices, and what is wrong with a file."""

import json

import jax.numpy as jnp
import pytest
from eval_tokenizer import WordTokenizer
from helpers import run_command
from numpy_llama import random_llama

from minference_jax.eval import Method, evaluate
from minference_jax.eval.methods import ABOUT, METHODS
from minference_jax.eval.own_data import read_own_data
from minference_jax.models.config import LlamaConfig

ROWS = [
    {"text": "The tea is fine.", "label": "good", "options": ["yes", "no"], "right": 1, "gold": ["It is", "fine"]},
    {"text": "one two three " * 40, "label": "bad", "options": ["up", "down", "very far"], "right": "up", "gold": 7},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_a_row_is_a_prompt_and_loses_its_middle_where_it_is_too_long(file):
    task, tokenizer = read_own_data(file, "{text} Is it {right}?", "gold", "f1", chat=False), WordTokenizer()
    assert (task.name, task.distinct) == ("mine", 2)
    short, long = (task.sample(tokenizer, 30, index, 0) for index in range(2))
    assert tokenizer.decode(short.tokens) == "The tea is fine. Is it 1?"
    assert (short.answers, short.max_new_tokens, short.about) == (("It is", "fine"), 64, {"row": 0})
    text = tokenizer.decode(long.tokens)
    assert len(long.tokens) <= 30 and text.startswith("one two three") and text.endswith("three  Is it up?")
    assert long.about == {"row": 1, "cut": True} and long.answers == ("7",)
    assert tokenizer.decode(read_own_data(file, "{text}", "gold", "f1").sample(tokenizer, 30, 0, 0).tokens) == (
        "<user>The tea is fine.<assistant>"
    )
    with pytest.raises(ValueError, match="mine, row 0: length 3 is too short"):
        task.sample(tokenizer, 3, 0, 0)


@pytest.mark.parametrize(
    ("metric", "reply", "score"),
    [
        ("exact", " it is. ", 1.0),
        ("exact", "it is fine", 0.0),
        ("f1", "fine wine", 2 / 3),
        ("rouge-l", "it was", 1 / 2),
        ("contains", "so fine!", 1.0),
    ],
)
def test_replies_are_judged_by_the_metric(file, metric, reply, score):
    task = read_own_data(file, "{text}", "gold", metric)
    assert task.score(reply, task.answers[0]) == pytest.approx(score)


def test_the_reply_is_the_likeliest_choice_of_the_row(file):
    tokenizer = WordTokenizer()
    config = LlamaConfig(400, 32, 40, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16)
    model = random_llama(config)
    task = read_own_data(file, "{text} So:", "right", "accuracy", choices=["options"], chat=False)
    assert task.answers == (("no",), ("up",))
    methods = [Method.fixed("dense", None)]
    results = evaluate(model, tokenizer, [task], lengths=[40], methods=methods, samples=9, batch=4)
    assert [result.index for result in results] == [0, 1]  # there are two rows
    for row, result in enumerate(results):
        prompt, likely = list(task.sample(tokenizer, 40, row, 0).tokens), {}
        for choice in task.choices[row]:
            ids = tokenizer.encode(f" {choice}")  # as a text goes on
            likely[choice] = float(model.token_log_likelihoods(jnp.asarray([prompt + ids]))[0, len(prompt) :].sum())
        best = max(likely, key=likely.__getitem__)
        assert result.reply == f" {best}" and result.score == (best in task.answers[row]) and result.density == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"template": "{title}"}, "row 0 has no field 'title'"),
        ({"answer": "gold2"}, "row 0 has no field 'gold2'; its fields are text, label"),
        ({"metric": "bleu"}, "metric must be one of exact, f1"),
        ({"metric": "accuracy"}, "accuracy, and nothing else, is over choices"),
        ({"choices": ["good", "bad"]}, "accuracy, and nothing else, is over choices"),
        ({"metric": "accuracy", "choices": ["good", "poor"], "answer": "label"}, "row 1: label 'bad' is none of"),
        ({"metric": "accuracy", "choices": ["text"]}, "row 0: text must list two or more choices"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_what_is_wrong_with_rows_is_named(file, changed, message):
    settings = {"template": "{text}", "answer": "gold", "metric": "exact"} | changed
    with pytest.raises(ValueError, match=message):
        read_own_data(file, **settings)


def test_the_list_names_tasks_methods_and_presets(capsys):
    status, out, _ = run_command(capsys, "eval", "--list")
    assert status == 0 and set(ABOUT) == {*METHODS, "static"}
    for name in ("needle-magic-raw", "turns", "longbook_qa_chn", "--data FILE", "minference-per-tile", "streaming-llm"):
        assert name in out
