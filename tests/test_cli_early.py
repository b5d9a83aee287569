"""What is wrong with a command line is said before the work, by every command."""

import json

import pytest
from checkpoints import write_byte_model
from helpers import run_command

from minference_jax import AShape, Llama
from minference_jax.patterns import HeadPatterns
from minference_jax.patterns.files import save_patterns

WRONG = {
    "a length past every prompt": ("bench kernels --lengths 1000000M", 2, "more than 16,777,216 tokens"),
    "as many new tokens": ("generate DIR hi --max-new-tokens 1000000000000", 2, "max-new-tokens"),
    "a picture in a folder that is not there": ("bench kernels --plot DIR/no/x.png", 2, "no is no directory"),
    "a picture of an unknown kind": ("inspect --patterns DIR/text --plot DIR/x.xyz", 2, "pictures end in .png"),
    "a field that no pattern has": ("bench operator --pattern a-shape:zz=1", 2, "no field=value of a-shape"),
    "heads that are none": ("bench operator --pattern dense --heads 3", 2, "no head layout"),
    "rows that are a text": ("bench prefill --rows DIR/text", 1, "text is not what --json printed"),
    "points that are a text": ("bench tradeoff --rows DIR/text", 1, "text is not what --json printed"),
    "answers without times": ("bench tradeoff --results DIR/text", 2, "give --results and --operator, or --rows"),
    "answers that are a text": ("bench tradeoff --results DIR/text --operator DIR/text", 2, "no file of results"),
    "a job's file that something else made": ("batch DIR/rows.jsonl --prompt {a} --out DIR/text", 2, "text.run.json"),
    "the same of a summary": ("summarize DIR/rows.jsonl --keywords a --out DIR/text", 2, "text.run.json"),
    "a row that has a field twice": ("batch DIR/twice.jsonl --prompt {a} --out DIR/x", 1, "'a' occurs twice"),
    "a row with a number that JSON has not": ("batch DIR/nan.jsonl --prompt {a} --out DIR/x", 1, "NaN is not a number"),
    "more rows at once than there are": ("batch DIR/rows.jsonl --prompt {a} --out DIR/x --batch 10000000", 2, "batch"),
    "reviews without end": ("make-reviews DIR/x.jsonl --count 100000000000000", 2, "count"),
    "a checkpoint's folder that holds something": ("convert DIR/nothing DIR", 1, "exists and is not empty"),
    "a checkpoint's folder below a file": ("convert DIR/nothing DIR/text/x", 2, "text is a file"),
    "a checkpoint's dtype": ("convert DIR/nothing DIR/x --dtype int4", 2, "dtype must be one of"),
    "an empty text": ("generate DIR --file DIR/empty", 1, "empty is empty"),
    "a text in another encoding": ("compare --model DIR --text DIR/latin", 1, "latin is not UTF-8 text"),
}

WITHOUT_EFFECT = {
    "--raw has no effect without --data": "eval --model DIR --raw",
    "--max-new-tokens has no effect without --data": "eval --model DIR --max-new-tokens 64",
    "--max-new-tokens has no effect with --choices": "batch DIR/a --prompt {a} --out DIR/x --choices a,b"
    " --max-new-tokens 256",
    "--seed has no effect with --data and no": "eval --model DIR --data DIR/a --template {a} --answer a --seed 0",
    "--density has no effect with --methods dense": "eval --model DIR --methods dense --density 0.2",
    "--system has no effect with --raw": "batch DIR/a --prompt {a} --out DIR/x --raw --system s",
    "--wait has no effect without --out": "summarize DIR/a --keywords a --wait",
    "--fp8 has no effect with --task": "compare --model DIR --task kv --fp8",
    "--samples has no effect without --task": "compare --model DIR --text DIR/text --samples 8",
    "--paper has no effect with --candidate": "search --model DIR --text t --out DIR/x --candidate a-shape --paper",
    "--query-tiles has no effect with --patterns": "search --model DIR --patterns p --verify v --query-tiles 16",
    "--verify-tokens has no effect without --verify": "search --model DIR --text t --out DIR/x --verify-tokens 1K",
    "--repeats has no effect with --rows": "bench prefill --rows DIR/text --repeats 3",
    "--pattern has no effect without minference": "bench prefill DIR --methods dense --pattern dense",
    "--pieces has no effect with --mesh": "bench prefill DIR --mesh heads=2 --pieces",
    "--layer has no effect without --model": "bench operator --pattern dense --layer 0",
    "--heads has no effect with --model": "bench operator --pattern dense --model DIR --heads 4/2/16",
    "--tokens has no effect without --head": "inspect DIR --tokens 2K",
    "--template has no effect with --raw": "generate DIR hi --raw --template t",
    "--top-p has no effect without --temperature": "generate DIR hi --top-p 0.5",
    "--question has no effect with --random-weights": "generate smollm2 --random-weights 128 --question q",
}


@pytest.mark.parametrize("message, command", WITHOUT_EFFECT.items(), ids=WITHOUT_EFFECT.values())
def test_an_option_without_effect_is_refused(capsys, tmp_path, message, command):
    (tmp_path / "text").write_text("hello")
    found, _, error = run_command(capsys, *(word.replace("DIR", str(tmp_path)) for word in command.split()))
    assert found == 2 and message in error


NO_WEIGHTS = {
    "a batch's prompt past the context": (
        "batch DIR/rows.jsonl --raw --prompt {a} --out DIR/x",
        1,
        "model's context of",
    ),
    "a batch in another job's file": (
        "batch DIR/short.jsonl --raw --prompt {a} --out DIR/job --max-new-tokens 8",
        2,
        "batch 3 instead of 2",
    ),
    "a summary's context": ("summarize DIR/rows.jsonl --raw --keywords a --context 64", 2, "no room for text"),
    "a length too short for a task": ("eval --tasks needle-magic-raw --lengths 4 --methods dense", 2, "settings: "),
    "results of another run": (
        "eval --tasks ppl --lengths 128 --methods dense --output DIR",
        2,
        "samples 3 instead of 50",
    ),
    "a search's dtype": ("search --text DIR/book --out DIR/x --tokens 128 --dtype int4", 2, "dtype must be one of"),
    "a layer that is not there": ("bench operator --pattern dense --lengths 128 --layer 9", 2, "layer must be in 0"),
    "a pattern file of another model": ("bench prefill DIR/model --pattern DIR/other.json", 2, "--pattern: "),
    "a rule that reads layers, on a mesh": ("eval --methods minference --mesh rows=2,heads=1", 2, "layer by layer"),
    "a rule of all heads, on a mesh": ("eval --methods longformer --mesh heads=2", 2, "sees all heads of a layer"),
}


@pytest.fixture(scope="module")
def folder_of_model(tmp_path_factory):
    """A model, and files for it."""
    folder = tmp_path_factory.mktemp("early")
    model = write_byte_model(folder / "model", special=("<pad>", "<s>", "</s>"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 256, "num_attention_heads": 4, "num_key_value_heads": 2})
    )
    (folder / "rows.jsonl").write_text(json.dumps({"a": "a" * 300}))
    (folder / "short.jsonl").write_text('{"a": "b"}')
    (folder / "book").write_text("a word and more " * 100)
    (folder / "job").write_text('{"row": 0, "reply": ""}\n')
    (folder / "job.run.json").write_text('{"batch": 3}')
    (folder / "results.jsonl").write_text('{"settings": {"samples": 3}}\n')
    save_patterns(HeadPatterns.uniform(AShape(1, 65), 7, 2), folder / "other.json")
    return folder


@pytest.mark.parametrize("command, status, message", NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_what_needs_no_weights_is_said_before_they_are_read(
    capsys, monkeypatch, folder_of_model, command, status, message
):
    monkeypatch.setattr(Llama, "from_pretrained", None)
    command = command.replace("DIR", str(folder_of_model)).split()
    command += [] if "prefill" in command else ["--model", str(folder_of_model / "model")]
    command += ["--batch", "2"] if command[0] == "batch" else []
    found, _, error = run_command(capsys, *command)
    assert (found, message in error) == (status, True), error


@pytest.mark.parametrize("command, status, message", WRONG.values(), ids=WRONG)
def test_a_wrong_command_line_ends_at_once(capsys, tmp_path, command, status, message):
    files = {"text": b"hello", "empty": b" \n", "latin": b"caf\xe9", "rows.jsonl": b'{"a": 1}\n'}
    for name, content in (files | {"twice.jsonl": b'{"a": 1, "a": 2}', "nan.jsonl": b'{"a": NaN}'}).items():
        (tmp_path / name).write_bytes(content)
    found, _, error = run_command(capsys, *(word.replace("DIR", str(tmp_path)) for word in command.split()))
    assert (found, message in error) == (status, True), error
