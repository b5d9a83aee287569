"""The command line as a script sees it: standard output, exit statuses, one-line errors."""

import io
import json
import os
import subprocess
import sys

import pytest
from checkpoints import CONFIG, random_tensors, write_byte_model
from helpers import run_command as run

from minference_jax import AShape, HeadPatterns, PerTile, SharedDensity, VerticalSlash, save_patterns
from minference_jax.cli import main
from minference_jax.models.config import LlamaConfig
from minference_jax.patterns.resolve import resolve_patterns
from minference_jax.patterns.text import format_pattern, parse_pattern

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama with one token for each byte, and a chat template."""
    directory = write_byte_model(tmp_path_factory.mktemp("model"), special=("<pad>", "<s>", "</s>"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_generate_prints_the_text_and_nothing_else(model, capsys):
    status, text, news = run(capsys, "generate", model, "Hello", "--max-new-tokens", 6)
    assert (status, news) == (0, "The reply is cut at 6 tokens (--max-new-tokens).\n")
    status, out, _ = run(capsys, "generate", model, "Hello", "--max-new-tokens", 6, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["text"] == text.removesuffix("\n")
    assert found["prompt_tokens"] == len("<u>Hello<a>")
    assert found["generated_tokens"] == len(found["tokens"]) == 6 and found["finish"] == "length"
    assert found["density"] == 1.0


def test_generate_puts_files_before_prompt_and_question(model, capsys, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("zwei ä".encode())))
    files = ("--file", tmp_path / "a.txt", "--file", "-")
    arguments = ("generate", model, *files, "--question", "who?", "--raw", "--max-new-tokens", 2, "--json")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert json.loads(out)["prompt_tokens"] == len("one\n\nzwei ä\n\nwho?".encode())


def test_sparse_generation_reports_its_density(model, capsys):
    prompt = "x" * 700
    pattern = "a-shape:sink=64,window=128"
    arguments = ("generate", model, prompt, "--pattern", pattern, "--max-new-tokens", 2)
    status, out, _ = run(capsys, *arguments, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["pattern"] == pattern
    assert 0.1 < found["density"] < 0.9
    assert 0 < found["estimated_recall"] < 1
    status, _, news = run(capsys, *arguments, "--stats")
    assert status == 0
    assert "prompt_tokens: 706" in news
    assert "density" in news


def test_sampling_follows_the_seed(model, capsys):
    def text(seed):
        arguments = ("generate", model, "a", "--max-new-tokens", 12, "--temperature", 5, "--seed", seed, "--json")
        return json.loads(run(capsys, *arguments)[1])["tokens"]

    assert text(1) == text(1)
    assert len({tuple(text(seed)) for seed in range(4)}) > 1


def test_convert_then_inspect(model, capsys, tmp_path):
    status, out, _ = run(capsys, "convert", model, tmp_path / "converted", "--dtype", "float32")
    assert status == 0
    assert "parameters in float32" in out
    status, out, _ = run(capsys, "inspect", tmp_path / "converted", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["config"]["num_layers"] == CONFIG["num_hidden_layers"]
    parameters = found["parameters"]
    assert parameters["embedding"] == 259 * CONFIG["hidden_size"]
    assert parameters["all"] == sum(n for name, n in parameters.items() if name != "all")
    assert parameters["all"] == sum(array.size for array in random_tensors(CONFIG | {"vocab_size": 259}).values())


def test_inspect_counts_patterns(capsys, tmp_path):
    heads = HeadPatterns(((AShape(8, 64), VerticalSlash(4, tiles=2)), (AShape(8, 64), AShape(8, 64))))
    save_patterns(heads, tmp_path / "patterns.json")
    status, out, _ = run(capsys, "inspect", "--patterns", tmp_path / "patterns.json", "--json")
    found = json.loads(out)["patterns"]
    assert status == 0
    assert found["heads a-shape:sink=8,window=64"] == 3
    assert found["layer 0"] == "1 a-shape, 1 vertical-slash"
    status, out, _ = run(capsys, "inspect", "--patterns", tmp_path / "patterns.json")
    assert status == 0
    assert "1 a-shape, 1 vertical-slash" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "Missing argument"),
        (("MODEL",), "give a prompt"),
        (("MODEL", "-", "--file", "-"), "standard input"),
        (("MODEL", "a", "--max-new-tokens", "0"), "max-new-tokens"),
        (("MODEL", "a", "--no-such-option"), "--no-such-option"),
        (("MODEL", "a", "--dtype", "int8"), "--dtype must be one of float32"),
        (("MODEL", "a", "--cache", "int4"), "--cache must be model, fp8 or int8"),
        (("MODEL", "a", "--prefill-chunk", "1G"), "'1G' is no length"),
        (("MODEL", "a", "--temperature", "1", "--top-p", "-1"), "top_p must be in (0, 1]"),
        (("MODEL", "a", "--prefill-chunk", "130"), "multiple of 128"),
        (("MODEL", "a", "--temperature", "1", "--seed", "1" + "0" * 30), "at most 64 bits"),
        (("MODEL", "a", "--rope-scaling", '{"factor": 2, "factor": 4}'), "'factor' occurs twice"),
        (("MODEL", "a", "--pattern", "diagonal"), "neither a file nor a pattern"),
        (("MODEL", "a", "--pattern", ""), "a pattern is missing"),
        (("MODEL", "a", "--pattern", "a-shape:width=3"), "no field=value of a-shape"),
        (("MODEL", "a", "--pattern", "a-shape:sink=3,sink=4"), "gives sink twice"),
        (("MODEL", "a", "--pattern", "vertical-slash:threshold=nan"), "nan is not a number"),
        (("MODEL", "a", "--pattern", "shared-density:density=inf"), "inf is not a number"),
        (("MODEL", "a", "--pattern", "vertical-slash:coverage=.5x"), "'vertical-slash:coverage=.5x'"),
    ],
)
def test_usage_errors_end_with_status_2(model, capsys, arguments, message):
    status, out, news = run(capsys, "generate", *(model if word == "MODEL" else word for word in arguments))
    assert (status, out) == (2, "")
    assert news.startswith("error: ")
    assert news.count("\n") == 1
    assert message in news


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("generate", "/no/such/model", "a"), "/no/such/model does not exist"),
        (("generate", "MODEL", "--file", "/no/such/file"), "/no/such/file"),
        (("convert", "MODEL", "MODEL"), "MODEL"),
    ],
)
def test_failures_are_one_line_and_status_1(model, capsys, arguments, message):
    status, out, news = run(capsys, *(model if word == "MODEL" else word for word in arguments))
    assert (status, out) == (1, "")
    assert news.startswith("error: ")
    assert news.count("\n") == 1
    assert message.replace("MODEL", str(model)) in news


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(ValueError, match="does not exist"):
        main(["--debug", "inspect", "/no/such/model"])


def test_help_and_version(capsys):
    assert run(capsys, "--version")[:2] == (0, "0.1.0\n")
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in ("generate", "demo", "fetch-demo-model", "convert", "inspect", "compare"):
        assert command in out


def test_runs_as_a_module_and_survives_a_reader_that_leaves():
    command = [sys.executable, "-m", "minference_jax", "--version"]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        left = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (left.returncode, left.stderr) == (1, "")


CONFIGURED = LlamaConfig.from_hf(CONFIG)


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("a-shape", AShape()),
        ("a-shape:sink=64,window=256", AShape(64, 256)),
        ("vertical-slash:columns=8,tiles=3,probes=spread,coverage=0.5", VerticalSlash(8, 6096, 3, "spread", 0.5)),
        ("shared-density:density=0.33,every=8", SharedDensity(0.33, every=8)),
        ("per-tile:every=8,threshold=1e-4", PerTile(8, 1e-4)),
    ],
)
def test_pattern_text_reads_back(text, pattern):
    assert parse_pattern(text) == pattern
    assert parse_pattern(format_pattern(pattern)) == pattern
    assert resolve_patterns(text, 2, 3) == HeadPatterns.uniform(pattern, 2, 3)


def test_pattern_names_files_and_presets(tmp_path):
    heads = HeadPatterns.uniform(AShape(1, 2), 2, 3)
    save_patterns(heads, tmp_path / "patterns.json")
    assert resolve_patterns(str(tmp_path / "patterns.json"), 2, 3) == heads
    assert resolve_patterns("streaming-llm", 2, 3) == HeadPatterns.uniform(AShape(1024, 4096), 2, 3)
    assert resolve_patterns("dense", 2, 3) is None


@pytest.mark.parametrize(
    "text",
    [
        "a-shape:window=wide",
        "vertical-slash:coverage=2.0",
        "dense:sink=1",
        "a-shape:sink",
        "a-shape:",
        "a-shape:sink=1,sink=2",
        "per-tile:every=8,threshold=nan",
        "shared-density:density=inf",
        "per-tile:every=8",
        "nothing",
    ],
)
def test_bad_pattern_text(text):
    with pytest.raises(ValueError):
        resolve_patterns(text, 2, 3)
