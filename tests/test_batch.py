"""Jobs over rows: files read, templates filled, replies equal to single ones, labels' probabilities, resumption."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write_byte_model
from eval_tokenizer import NumberTokenizer
from helpers import run_command
from numpy_llama import random_llama

from minference_jax.jobs import PromptTemplate, batch_replies, read_rows
from minference_jax.jobs.batch_runner import batches
from minference_jax.jobs.choices import choice_ids, choice_log_probabilities
from minference_jax.models.config import LlamaConfig
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama

CONFIG = LlamaConfig(400, 32, 40, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16)


LABELS = ("good", "very good", "bad")


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_llama(CONFIG)


def reviews(count: int) -> list[dict]:
    words = ("fine", "poor", "quick", "slow", "loud", "warm", "cold", "small")
    return [{"text": " ".join(words[(i * j) % 7] for j in range(1, 3 + i % 9)), "stars": i % 5} for i in range(count)]


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        (
            "a.jsonl",
            '{"text": "One\\nline", "n": 3}\n\n"just text"\n',
            [{"text": "One\nline", "n": 3}, {"text": "just text"}],
        ),
        (
            "a.csv",
            'text,n\n"Two\nlines, quoted",3\n한국어,4\n',
            [{"text": "Two\nlines, quoted", "n": "3"}, {"text": "한국어", "n": "4"}],
        ),
        ("a.tsv", "text\tn\na, b\t1\n", [{"text": "a, b", "n": "1"}]),
        ("a.txt", "\ufefffirst\r\n\r\nsecond", [{"text": "first"}, {"text": "second"}]),
    ],
)
def test_rows_of_every_kind_of_file(tmp_path, name, text, rows):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2: no JSON"),
        ("a.jsonl", b"[1]", "line 1: a row is an object or a string, got list"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3: 1 fields, 2 are named"),
        ("a.csv", b"a,a\n1,2\n", "names that differ"),
        ("a.csv", b"", "has no rows"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_templates_name_their_fields():
    template = PromptTemplate('{{"stars": {stars}}} {text}')
    assert template.fields == ("stars", "text")
    assert template.fill({"text": "a {b}", "stars": [1, 2]}) == '{"stars": [1, 2]} a {b}'
    with pytest.raises(ValueError, match=r"row 1 has no field 'stars'; its fields are text"):
        template.check([{"text": "", "stars": 0}, {"text": ""}])
    with pytest.raises(ValueError, match="uses no field"):
        PromptTemplate("hello").check([{"text": ""}])
    for wrong in ("{", "{}", "{0}", "{text:>3}", "{text!r}", "{a.b}"):
        with pytest.raises(ValueError, match="prompt"):
            PromptTemplate(wrong)


@pytest.mark.parametrize("shared", [False, True])
def test_replies_are_those_of_single_prompts(model, shared):
    tokenizer = NumberTokenizer()
    rows, template = (
        reviews(5),
        PromptTemplate(("ten words that all rows share " * 40 if shared else "") + "Say: {text}"),
    )
    replies = batch_replies(model, tokenizer, rows, template, max_new_tokens=6, batch=2, raw=True)
    assert [reply.row for reply in replies] == list(range(5))
    for row, reply in zip(rows, replies, strict=True):
        prompt = tokenizer.encode(template.fill(row))
        single = generate(model, [prompt], max_new_tokens=6, eos_token_ids=(0,))
        assert reply.reply == tokenizer.decode(single.sequences()[0], skip_special_tokens=True)
        assert reply.tokens == single.lengths[0] and reply.probabilities is None


def test_labels_have_the_probabilities_of_their_tokens(model):
    tokenizer = NumberTokenizer()
    rows, template = reviews(3), PromptTemplate("{text} is")
    assert choice_ids(tokenizer, LABELS) == [tokenizer.encode(label) for label in LABELS]
    ended = choice_ids(tokenizer, ("very", "very good"))
    assert ended == [[*tokenizer.encode("very"), 0], [*tokenizer.encode("very good"), 0]]
    replies = batch_replies(model, tokenizer, rows, template, choices=LABELS, batch=2, raw=True)
    for row, reply in zip(rows, replies, strict=True):
        assert reply.probabilities is not None and list(reply.probabilities) == list(LABELS)
        prompt, scores = tokenizer.encode(template.fill(row)), []
        for label in LABELS:
            ids = tokenizer.encode(label)
            log_p = model.token_log_likelihoods(jnp.asarray([prompt + ids]))[0, len(prompt) :]
            scores.append(float(log_p.sum()))
        expected = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(list(reply.probabilities.values()), expected, atol=2e-6)
        assert reply.reply == LABELS[int(expected.argmax())]
    for wrong in ((), ("a",), ("a", "a"), ("a", " ")):
        with pytest.raises(ValueError, match="choices must"):
            choice_ids(tokenizer, wrong)


def test_the_cache_that_labels_are_scored_on_stays(model):
    cache = model.init_cache(1, 256)
    logits, cache = model.prefill(jnp.asarray([[5, 6, 7]]), None, cache)
    first = choice_log_probabilities(model, logits, cache, [[[1, 2], [3, 4]]])
    np.testing.assert_array_equal(first, choice_log_probabilities(model, logits, cache, [[[1, 2], [3, 4]]]))
    np.testing.assert_allclose(np.exp(first).sum(), 1, rtol=1e-6)


def test_batches_are_full_and_rows_of_another_attention_apart():
    sizes = [100, 300, 128, 129, 5, 600, 90]
    assert batches(sizes, 3, lambda bucket: "dense") == [[5, 1, 3], [0, 2, 4], [6]]
    assert batches(sizes, 3, lambda bucket: bucket > 256) == [[5, 1], [3, 0, 2], [4, 6]]


def test_a_job_goes_on_where_it_was_and_refuses_another(model, tmp_path):
    tokenizer, out = NumberTokenizer(), tmp_path / "out.jsonl"
    rows, template = reviews(7), PromptTemplate("Say: {text}")
    options = {"max_new_tokens": 4, "batch": 2, "raw": True}
    whole = batch_replies(model, tokenizer, rows, template, out=out, **options)
    text = out.read_text()
    assert [json.loads(line)["row"] for line in text.splitlines()] == list(range(7))
    lines = text.splitlines(keepends=True)
    out.write_text("".join(lines[3:5]) + lines[0][:20])  # killed while it wrote
    done = []
    again = batch_replies(model, tokenizer, rows, template, out=out, progress=lambda n, _: done.append(n), **options)
    assert again == whole and out.read_text() == text and done[0] == 2
    # Without a batch it is the file's: what fits may have changed since.
    assert batch_replies(model, tokenizer, rows, template, out=out, **options | {"batch": None}) == whole
    with pytest.raises(ValueError, match="is of another job: batch 2 instead of 3"):
        batch_replies(model, tokenizer, rows, template, out=out, **options | {"batch": 3})
    other = model.with_patterns("a-shape:sink=64,window=64")
    with pytest.raises(ValueError, match="is of another job: model"):
        batch_replies(other, tokenizer, rows, template, out=out, **options)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists, and"):
        batch_replies(model, tokenizer, rows, template, out=tmp_path / "notes.txt", **options)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_cannot_work_is_said_before_anything_runs(model):
    tokenizer, template = NumberTokenizer(), PromptTemplate("{text}")
    small = random_llama(dataclasses.replace(CONFIG, max_position_embeddings=64))
    long = [{"text": "a"}, {"text": "word " * 70}]
    with pytest.raises(ValueError, match=r"row 1: a prompt of 71 tokens"):
        batch_replies(small, tokenizer, long, template, raw=True, max_new_tokens=3)
    for options, message in (
        ({"batch": 0}, "batch and max_new_tokens"),
        ({"system": "x", "raw": True}, "no system message"),
        ({"choices": ["a"]}, "choices must"),
    ):
        with pytest.raises(ValueError, match=message):
            batch_replies(model, tokenizer, [{"text": "a"}], template, **options)
    with pytest.raises(ValueError, match="rows"):
        batch_replies(model, tokenizer, [], template)


def test_the_command(tmp_path, capsys):
    folder = write_byte_model(tmp_path / "model", special=("<pad>", "<s>", "</s>"))
    rows, out = tmp_path / "reviews.csv", tmp_path / "out.jsonl"
    rows.write_text("text,stars\nfine,4\n한국어,2\n")
    command = ["batch", rows, "--model", folder, "--raw", "--prompt", "{text}:", "--out", out, "--batch", 2]
    status, printed, _ = run_command(capsys, *command, "--choices", "good,bad")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert status == 0 and [line["row"] for line in lines] == [0, 1]
    for label in ("good", "bad"):
        assert f"{label}: {sum(line['reply'] == label for line in lines)} of 2" in printed
    for extra, message in (
        (["--choices", "good"], "--choices: choices must"),
        (["--prompt", "{nothing}"], "--prompt: row 0 has no field 'nothing'"),
        (["--out", tmp_path], "--out: "),
        (["--pattern", "star"], "--pattern: "),
    ):
        status, _, errors = run_command(capsys, *command, *extra)
        assert status == 2 and message in errors
