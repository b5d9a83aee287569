"""`minference-jax search` and the pictures of `inspect`, on a random model of bytes."""

import json
import signal

import pytest
from checkpoints import write_byte_model
from helpers import run_command as run

from minference_jax import load_patterns
from minference_jax.cli.search import _target
from minference_jax.cli.stopping import Stopped
from minference_jax.patterns import AShape
from minference_jax.search import Latency
from minference_jax.search.measure import LayerMeter

TOKENS = ("--tokens", 256, "--target", "0.6", "--query-tiles", 2)
CANDIDATE = ("--candidate", "a-shape:sink=16,window=512")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with one token for each byte, and two texts."""
    folder = tmp_path_factory.mktemp("search")
    write_byte_model(folder / "model")
    for name, word in (("a.txt", "sparse "), ("b.txt", "dense\n")):
        (folder / name).write_text("".join(f"{word}{i}" for i in range(200)))
    return folder


def test_search_writes_patterns_and_verifies_them(folder, capsys):
    out = folder / "patterns.json"
    texts = ("--text", folder / "a.txt", folder / "b.txt", "--out", out)  # as a shell expands *.txt
    arguments = ("search", "--model", folder / "model", *texts, *TOKENS, *CANDIDATE)
    status, table, news = run(capsys, *arguments, "--verify", folder / "b.txt", "--plot", folder / "a.svg")
    assert status == 0
    patterns = load_patterns(out, heads=3, layers=2)
    assert f"{out}: 6 a-shape" in table
    assert "| searched | " in table and " GiB at most" in table
    assert "b.txt, 256 tokens" in table
    assert "layer 2 of 2" in news and (folder / "a.svg").read_text().count("<image") >= 4
    assert all(isinstance(p, AShape) for layer in patterns for p in layer)


def test_samples_may_be_prompts_of_tasks(folder, capsys):
    """A text cut at the wanted length, and a prompt of each task, which is shorter than that."""
    texts = ("--text", folder / "a.txt", "--out", folder / "prompts.json")
    status, found, _ = run(
        capsys,
        "search",
        "--model",
        folder / "model",
        *texts,
        *TOKENS,
        *CANDIDATE,
        "--tasks",
        "passkey,number",
        "--json",
    )
    assert status == 0
    found = json.loads(found)["search"]
    assert found["mean density"] <= 0.6
    sizes = [sample["tokens"] for sample in found["samples"]]
    assert sizes[0] == 256
    assert len(sizes) == 3
    assert all(128 < size < 256 for size in sizes[1:])


def test_one_head_is_drawn(folder, capsys):
    (folder / "one.json").write_text(json.dumps([{str(j): ["stream_llm", 8, 64, 1] for j in range(3)}] * 2))
    arguments = ("inspect", folder / "model", "--patterns", folder / "one.json", "--plot", folder / "head.png")
    status, out, _ = run(capsys, *arguments, "--head", "1.2", "--text", folder / "a.txt", "--tokens", 256, "--json")
    assert status == 0
    assert 0 < json.loads(out)["head"]["recall"] <= 1
    assert (folder / "head.png").read_bytes().startswith(b"\x89PNG")
    status, _, news = run(capsys, *arguments, "--head", "2.0", "--text", folder / "a.txt")
    assert (status, news.count("\n")) == (1, 1)
    assert "2 layers of 3 heads" in news


def test_targets_as_words():
    assert _target("") is None
    assert _target("0.25") == 0.25
    assert _target("2.5ms") == Latency(2.5)
    assert _target("a-shape:sink=64,window=512") == AShape(64, 512)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--text", "a.txt", "--out", "p.json"), 2, "--model"),
        (("--model", "model", "--text", "a.txt"), 2, "--out"),
        (("--model", "model"), 2, "--text"),
        (("--model", "model", "--patterns", "streaming-llm"), 2, "--verify"),
        (("--model", "model", "--text", "a.txt", "--out", "p.json", "--target", "?"), 2, "--target '?'"),
        (("--model", "model", "--text", "a.txt", "--out", "p.json", "--target", "2"), 2, "between 0 and 1"),
        (("--model", "model", "--text", "a.txt", "--out", "p.json", "--candidate", "blob"), 2, "is no pattern"),
        (("--model", "model", "--text", "a.txt", "--out", "nowhere/p.json"), 2, "is no directory"),
        (("--model", "model", "--text", "a.txt", "--out", "p.json", "--tokens", "99999"), 1, "99,999 are wanted"),
        (("--model", "model", "--text", "none.txt", "--out", "p.json"), 1, "none.txt"),
        (("--model", "model", "--text", "a.txt", "--out", "p.json", "--tokens", "256", "--tasks", "?"), 2, "no task"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, monkeypatch, arguments, status, message):
    monkeypatch.chdir(folder)
    found, out, news = run(capsys, "search", *arguments)
    assert (found, out) == (status, "")
    assert news.startswith("error: ")
    assert news.count("\n") == 1
    assert message in news


def test_a_stopped_search_says_what_is_kept_and_goes_on(folder, capsys, monkeypatch):
    out = folder / "stopped.json"
    arguments = ("search", "--model", folder / "model", "--text", folder / "a.txt", "--out", out, *TOKENS, *CANDIDATE)
    measure, layers = LayerMeter.measure, []

    def stops_at_the_second(self, *of_layer):
        layers.append(of_layer)
        if len(layers) == 2:
            raise Stopped(signal.SIGINT)
        return measure(self, *of_layer)

    monkeypatch.setattr(LayerMeter, "measure", stops_at_the_second)
    status, _, news = run(capsys, *arguments)
    kept = f"what is done is in {out}.partial, and the same command goes on there"
    assert status == 130 and f"error: interrupted: Searching layers, 1 of 2; {kept}\n" in news
    status, _, news = run(capsys, *arguments)
    assert status == 0 and "resuming: 1 layers kept\n" in news and "layer 2 of 2" in news and len(layers) == 3
