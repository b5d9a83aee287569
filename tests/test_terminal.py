"""Commands on a pseudo-terminal and off it: a streamed reply, Ctrl-C, SIGTERM, lines of progress, completion."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import typer
from checkpoints import write_byte_model
from helpers import run_command
from safetensors.numpy import load_file, save_file

from minference_jax.cli import main, progress
from minference_jax.cli.app import app
from minference_jax.cli.stopping import stoppable

ON_A_TERMINAL = """
import os, pty, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells have their background jobs ignore it, these tests perhaps
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A random model of bytes that writes small letters alone: every other byte has logit 0, and theirs are pairs of
    opposite sign."""
    directory = write_byte_model(tmp_path_factory.mktemp("letters") / "model")
    tensors = load_file(directory / "model.safetensors")
    vocab = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    head = np.zeros_like(tensors["lm_head.weight"])
    for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz"):
        row = tensors["lm_head.weight"][vocab[chr(ord("a") + number // 2)]]
        head[vocab[letter]] = row if number % 2 else -row
    save_file(tensors | {"lm_head.weight": head}, directory / "model.safetensors")
    return directory


def test_a_streamed_reply_is_one_paragraph(letters, monkeypatch, capsys):
    command = ["generate", str(letters), "x" * 300, "--raw", "--max-new-tokens", "60"]
    _, found, _ = run_command(capsys, *command, "--json")
    reply = json.loads(found)["text"]
    assert len(reply) == 60 and reply.isalpha()
    monkeypatch.setenv("TERM", "xterm")
    own, other = os.openpty()
    with open(other, "w") as terminal, open(own, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        seen: list[bytes] = []
        reader = threading.Thread(target=lambda: seen.extend(read_all(screen)), daemon=True)
        reader.start()
        status = main(command)
        terminal.write("[the end]")
        terminal.flush()
        reader.join(20)
        monkeypatch.undo()
    text = b"".join(seen).decode()
    assert status == 0 and "Reading the prompt" in text
    assert f"{reply}\r\nThe reply is cut at 60 tokens" in text  # nothing in between, no line torn
    assert "Reading" not in text[text.index(reply) :]


def read_all(screen):
    """What comes, up to the words that the test writes at its end."""
    text = b""
    while b"[the end]" not in text:
        text += screen.read(4096)
    return [text]


def test_ctrl_c_in_a_prefill_ends_the_program(letters, tmp_path):
    (tmp_path / "long.txt").write_text("a long text " * 4000)
    command = [sys.executable, "-m", "minference_jax", "generate", str(letters), "--raw", "--prefill-chunk", "128"]
    command += ["--file", str(tmp_path / "long.txt")]
    with subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm"},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        text = b""
        while b"Reading the prompt" not in text:
            text += (new := os.read(process.stdout.fileno(), 4096))
            assert new, text
        process.stdin.write(b"\x03")
        process.stdin.flush()
        started = time.monotonic()
        text += process.stdout.read()
        assert process.wait() == 130, text
    assert time.monotonic() - started < 20
    assert re.search(rb"error: interrupted: Reading the prompt.*; nothing is kept\r\n", text)


def test_sigterm_in_eval_says_what_is_kept_and_the_command_goes_on(letters, tmp_path, capsys):
    out = tmp_path / "out" / "results.jsonl"
    command = ["eval", "--model", str(letters), "--tasks", "passkey", "--lengths", "256", "--methods", "dense"]
    command += ["--samples", "60", "--batch", "1", "--output", str(out.parent)]
    with subprocess.Popen([sys.executable, "-m", "minference_jax", *command], stderr=subprocess.PIPE) as process:
        while not out.exists() or out.read_bytes().count(b"\n") < 4:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, news = process.communicate(timeout=60)
    assert process.returncode == 143
    kept = out.read_bytes().count(b"\n") - 1
    assert re.search(
        rf"error: terminated: Evaluating, \d+ of 60; what is done is in {out}, and the same", news.decode()
    )
    status, _, news = run_command(capsys, *command)
    assert status == 0 and f"resuming: {kept} results kept\n" in news


def test_lines_come_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.05)
    with progress.progress("Working", unit="rows") as work:
        work(2, 9)
        work(4, 9)
        deadline = time.monotonic() + 20
        text = ""
        while "Working" not in text and time.monotonic() < deadline:
            time.sleep(0.02)
            text += capsys.readouterr().err
    assert re.fullmatch(r"resuming: 2 rows kept\nWorking: 4 of 9, \d+ s, about \d+ s left\n", text)


def test_a_command_that_does_not_end_by_itself_is_ended():
    code = (
        "import os, signal, threading, time\n"
        "from minference_jax.cli import progress, stopping\n"
        "stopping.PATIENCE = 0.1\n"
        "with stopping.stoppable(), progress.progress('Waiting', keeps='here'):\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except BaseException:\n"
        "        time.sleep(60)  # as a compiled program that goes on\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 143
    assert done.stderr == "error: terminated: Waiting; what is done is in here, and the same command goes on there\n"


def test_handlers_are_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def commands(group, words=()):
    """Every command with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


ALL = list(commands(typer.main.get_command(app)))


@pytest.mark.parametrize(("words", "command"), ALL, ids=[" ".join(words) for words, _ in ALL])
def test_help_has_an_example_that_the_command_takes(words, command):
    examples = re.findall(r"Example: minference-jax (.+?)(?:\n\n|\Z)", command.help, re.DOTALL)
    assert examples
    for example in examples:
        arguments = shlex.split(" ".join(example.split()))
        assert tuple(arguments[: len(words)]) == words
        assert command.make_context(words[-1], arguments[len(words) :]).params


@pytest.mark.parametrize(
    ("typed", "proposed"),
    [
        ("inspe", "inspect"),
        ("generate DIR --pattern vert", "vertical-slash"),
        ("eval --tasks ppl,needle-magic-r", "ppl,needle-magic-raw"),
        ("eval --methods dense,bigb", "dense,bigbird"),
        ("convert a b --dtype bf", "bfloat16"),
    ],
)
def test_a_shell_completes(monkeypatch, capsys, typed, proposed):
    words = ["minference-jax", *typed.split()]
    for name, value in (("COMP_WORDS", " ".join(words)), ("COMP_CWORD", str(len(words) - 1))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("_MINFERENCE_JAX_COMPLETE", "complete_bash")
    with pytest.raises(SystemExit, match="0"):
        main([])
    assert proposed in capsys.readouterr().out.split()
