"""Models by name in the hub's local cache: found, with a revision too, not found, and nothing downloaded."""

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import numpy as np
import pytest
from checkpoints import write_byte_model
from helpers import run_command

from minference_jax import Llama, load_tokenizer
from minference_jax.checkpoints.convert import open_checkpoint
from minference_jax.checkpoints.hub import local_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with one model, org/tiny, as downloads leave it: files are links into a folder of blobs."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "hub" / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    blobs = write_byte_model(model / "blobs")
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    return tmp_path


def test_a_name_is_the_snapshot_in_the_cache(cache, capsys):
    snapshot = cache / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert local_checkpoint("org/tiny") == local_checkpoint(f"org/tiny@{COMMIT}") == snapshot
    assert open_checkpoint("org/tiny").path == snapshot
    assert load_tokenizer("org/tiny").encode("a") == load_tokenizer(snapshot).encode("a")
    named, given = (Llama.from_pretrained(path, dtype="float32").params() for path in ("org/tiny", snapshot))
    np.testing.assert_array_equal(named["embed"], given["embed"])
    status, out, _ = run_command(capsys, "inspect", "org/tiny", "--json")
    assert status == 0 and '"vocab_size": 256' in out


def test_a_folder_here_comes_before_the_cache(cache):
    write_byte_model(cache / "tiny")
    (cache / "org").mkdir()
    (cache / "org" / "tiny").symlink_to(cache / "tiny")
    assert open_checkpoint("org/tiny").path.resolve() == cache / "tiny"


def test_what_is_not_there_is_said_and_not_downloaded(cache, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append(options.get("local_files_only", False))
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name in ("org/other", "org/tiny@other"):
        with pytest.raises(ValueError, match=r"Nothing is downloaded unless asked: `hf download org/"):
            local_checkpoint(name)
    assert asked == [True, True]
    with pytest.raises(RuntimeError, match="org/other could not be downloaded: no network"):
        Llama.from_pretrained("org/other", download=True)
    assert asked == [True, True, False]
    for path in ("nowhere", "/no/such/model", "a/b/c", "../x"):
        with pytest.raises(ValueError, match="does not exist"):
            local_checkpoint(path)
    assert len(asked) == 3
