"""Replies by a JSON schema: each fits it, is the likeliest that does, and is the same when a job goes on."""

import json

import jsonschema
import numpy as np
import pytest
from checkpoints import write_byte_model
from helpers import run_command
from numpy_llama import random_llama

from minference_jax.jobs import PromptTemplate, batch_replies
from minference_jax.jobs.json_schema import JsonSchema, _likeliest
from minference_jax.models.config import LlamaConfig
from minference_jax.text.tokenizer import load_tokenizer

OBJECT = {
    "type": "object",
    "properties": {
        "label": {"enum": ["good", "bad", "좋음"]},
        "stars": {"type": "integer", "minimum": 0, "maximum": 5},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["label", "stars", "tags"],
    "additionalProperties": False,
}
ROWS = [{"text": text} for text in ("fine", "한국어", "so so, but quick", "poor", "q")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_byte_model(tmp_path_factory.mktemp("schema") / "model", special=("<pad>", "<s>", "</s>"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    """More ids than the tokenizer has."""
    config = LlamaConfig(tokenizer.vocab_size + 9, 32, 40, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16)
    return random_llama(config)


def run(model, tokenizer, schema, **options):
    template = PromptTemplate("Rate: {text}")
    return batch_replies(model, tokenizer, ROWS, template, json_schema=schema, batch=2, raw=True, **options)


def test_every_reply_fits_and_a_job_goes_on(model, tokenizer, tmp_path):
    out = tmp_path / "out.jsonl"
    replies = run(model, tokenizer, OBJECT, max_new_tokens=64, out=out)
    assert all(reply.finished for reply in replies)
    for reply in replies:
        jsonschema.validate(value := json.loads(reply.reply), OBJECT)
        assert reply.reply == json.dumps(value, ensure_ascii=False)
    text = out.read_text()
    out.write_text("".join(text.splitlines(keepends=True)[1:3]) + '{"row"')  # killed while it wrote
    assert run(model, tokenizer, OBJECT, max_new_tokens=64, out=out) == replies and out.read_text() == text
    with pytest.raises(ValueError, match=r"of another job: json_schema .*, max_new_tokens 64 instead of 63"):
        run(model, tokenizer, {"enum": ["good"]}, max_new_tokens=63, out=out)
    backwards = OBJECT | {"properties": dict(reversed(OBJECT["properties"].items()))}  # keys of replies come so, too
    with pytest.raises(ValueError, match="of another job: json_schema "):
        run(model, tokenizer, backwards, max_new_tokens=64, out=out)


def test_steps_are_one_program_and_a_cut_reply_is_marked(model, tokenizer):
    before = _likeliest._cache_size()
    whole = run(model, tokenizer, {"type": "string", "maxLength": 20}, max_new_tokens=60)
    cut = run(model, tokenizer, {"type": "string", "minLength": 20}, max_new_tokens=5)
    assert _likeliest._cache_size() - before <= 1  # of this batch size, whatever schema and step
    assert all(len(json.loads(reply.reply)) <= 20 for reply in whole)
    assert not any(reply.finished for reply in cut) and {reply.tokens for reply in cut} == {5}


def test_the_likeliest_allowed_token_is_taken():
    logits = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    allowed = np.random.default_rng(1).random((3, 96)) < 0.2
    words = np.packbits(allowed, axis=1, bitorder="little").view(np.uint32)
    expected = np.where(allowed[:, :70], logits, -np.inf).argmax(1)
    np.testing.assert_array_equal(_likeliest(logits, words), expected)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "word"}, "json_schema: .*word"),
        ([], "json_schema must be an object, got list"),
        (True, "json_schema must be an object, got bool"),
        ({"type": "string", "unevaluatedItems": False, "contains": 3}, "json_schema: "),
    ],
)
def test_what_is_no_schema_is_said(model, tokenizer, schema, message):
    with pytest.raises(ValueError, match=message):
        run(model, tokenizer, schema)


def test_what_a_schema_needs(model, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="cannot both say"):
        run(model, tokenizer, OBJECT, choices=("a", "b"))
    with pytest.raises(ValueError, match="a fast tokenizer of Hugging Face"):
        JsonSchema(OBJECT, object(), 300)
    with pytest.raises(ValueError, match="json_schema: vocab size too small"):
        JsonSchema(OBJECT, tokenizer, 100)
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"a JSON schema needs llguidance: pip install 'minference-jax\[schema\]'"
    ):
        JsonSchema(OBJECT, tokenizer, 300)


def test_the_command(folder, tmp_path, capsys):
    rows, schema, out = tmp_path / "rows.txt", tmp_path / "schema.json", tmp_path / "out.jsonl"
    rows.write_text("fine\npoor\n")
    schema.write_text(json.dumps({"enum": ["good", "bad"]}))
    command = ["batch", rows, "--model", folder, "--raw", "--prompt", "{text}:", "--out", out, "--json-schema", schema]
    status, _, errors = run_command(capsys, *command)
    assert status == 0, errors
    assert {json.loads(json.loads(line)["reply"]) for line in out.read_text().splitlines()} <= {"good", "bad"}
    wrong = (
        ("{", "schema.json: "),
        ("null", "--json-schema: json_schema must be an object, got NoneType"),
        ('{"type": "word"}', "--json-schema: json_schema: "),
    )
    for text, message in wrong:
        schema.write_text(text)
        status, _, errors = run_command(capsys, *command)
        assert status == 2 and message in errors
