"""Summaries by keywords: counts as the file has them, rows that exist, parts that fit, notes joined, resumption."""

import json

import pytest
from checkpoints import write_byte_model
from eval_tokenizer import NumberTokenizer
from helpers import run_command
from numpy_llama import random_llama

from minference_jax.data.reviews import make_reviews
from minference_jax.jobs import read_rows, summarize
from minference_jax.jobs.summarize import _parts
from minference_jax.models.config import LlamaConfig
from minference_jax.models.llama import Llama

KEYWORDS = ("quality", "price", "품질", "nothing")


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_llama(LlamaConfig(900, 32, 40, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16))


def test_reviews_are_the_same_for_a_seed_and_say_what_they_are_about():
    rows = make_reviews(200)
    assert rows == make_reviews(200) != make_reviews(200, seed=1) and len(make_reviews()) == 2_000
    assert {row["language"] for row in rows} == {"en", "ko"} and {row["label"] for row in rows} == {
        "positive",
        "negative",
    }
    assert all(topic in row["text"].casefold() for row in rows for topic in row["about"])
    with pytest.raises(ValueError, match="count"):
        make_reviews(0)


def test_parts_hold_every_word_once_and_fit(model):
    tokenizer, texts = NumberTokenizer(), [" ".join(f"w{row}" for _ in range(3 * row)) or "x" for row in range(12)]
    parts = _parts(tokenizer, texts, 40)
    assert len(parts) > 1 and all(len(tokenizer.encode(part.text)) <= 40 for part in parts)
    assert frozenset().union(*(part.rows for part in parts)) == set(range(12))
    for row, text in enumerate(texts):
        found = [line for part in parts for line in part.text.split("\n") if line.startswith(f"[{row}] ")]
        assert " ".join(line.split("] ")[1] for line in found) == text


def test_counts_are_those_of_the_file_and_citations_exist(model, tmp_path):
    rows, tokenizer = make_reviews(24), NumberTokenizer()
    seen = []
    options = {"context": 220, "max_new_tokens": 4, "raw": True}
    found = summarize(
        model, tokenizer, rows, KEYWORDS, out=tmp_path / "notes.jsonl", progress=lambda *p: seen.append(p), **options
    )
    assert found.rows == 24 and found.parts > 1 and [one.keyword for one in found.findings] == list(KEYWORDS)
    for one in found.findings:
        texts = [row["text"].lower() for row in rows]
        assert list(one.rows) == [i for i, text in enumerate(texts) if one.keyword in text]
        assert one.mentions == sum(text.count(one.keyword) for text in texts)
        assert set(one.citations) <= set(range(24)) and bool(one.citations) == bool(one.rows) == bool(one.summary)
    text = (tmp_path / "notes.jsonl").read_text()
    assert len(text.splitlines()) == len(seen)
    (tmp_path / "notes.jsonl").write_text("".join(text.splitlines(keepends=True)[:2]))
    assert summarize(model, tokenizer, rows, KEYWORDS, out=tmp_path / "notes.jsonl", **options) == found
    with pytest.raises(ValueError, match="is of another job: keywords"):
        summarize(model, tokenizer, rows, ("price",), out=tmp_path / "notes.jsonl", **options)


def test_rows_that_the_model_names_are_the_citations(model, monkeypatch):
    tokenizer = NumberTokenizer()
    monkeypatch.setattr(tokenizer, "decode", lambda *_, **__: "Good [1], bad [7] and [0].")
    found = summarize(model, tokenizer, [{"text": "price a"}, {"n": "price b"}], ["Price"], max_new_tokens=2, raw=True)
    assert found.findings[0].citations == (1, 0) and found.parts == 1
    assert found.findings[0].summary == "Good [1], bad [7] and [0]."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "rows"),
        ({"keywords": []}, "keywords"),
        ({"keywords": ["a", "A"]}, "keywords"),
        ({"context": 20}, "context 20 has no room"),
    ],
)
def test_what_cannot_work_is_said(model, change, message):
    arguments = {"rows": [{"text": "a"}], "keywords": ["a"], "raw": True} | change
    rows, keywords = arguments.pop("rows"), arguments.pop("keywords")
    with pytest.raises(ValueError, match=message):
        summarize(model, NumberTokenizer(), rows, keywords, **arguments)


def test_the_commands(tmp_path, capsys):
    folder = write_byte_model(tmp_path / "model", special=("<pad>", "<s>", "</s>"))
    reviews = tmp_path / "reviews.jsonl"
    assert run_command(capsys, "make-reviews", reviews, "--count", 5)[0] == 0
    assert read_rows(reviews) == make_reviews(5)
    command = ["summarize", reviews, "--model", folder, "--raw", "--max-new-tokens", 3, "--context", 400]
    status, printed, _ = run_command(capsys, *command, "--keywords", "quality,배송", "--json")
    found = json.loads(printed)
    assert status == 0 and found["rows"] == 5 and [one["keyword"] for one in found["findings"]] == ["quality", "배송"]
    status, printed, _ = run_command(capsys, *command, "--keywords", "price")
    assert status == 0 and "5 rows, read in" in printed and "price: " in printed
    assert run_command(capsys, *command, "--keywords", "a,,b")[0] == 2
