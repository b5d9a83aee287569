"""Checkpoints straight to the devices of a mesh: the parameters of one device, in slices, and little in between."""

import jax
import numpy as np
import pytest
from checkpoints import CONFIG, random_tensors, write_hf
from gguf_files import gguf_tensors, write_gguf

from minference_jax.checkpoints import convert, gguf_file, hf_files
from minference_jax.checkpoints.convert import load_checkpoint
from minference_jax.models.llama import Llama
from minference_jax.parallel import make_mesh

# Every axis that a mesh cuts is even. Two KV heads of 4 dimensions: neither axis of `(k h)` can be taken for the other.
EVEN = CONFIG | {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
PHI3 = EVEN | {"model_type": "phi3", "original_max_position_embeddings": 1024, "partial_rotary_factor": 1.0}


def checkpoint(directory, kind):
    config = PHI3 if kind == "phi3" else EVEN
    directory.mkdir()
    if kind == "gguf":
        return write_gguf(directory / "model.gguf", gguf_tensors(random_tensors(config), config), config)
    return write_hf(directory, random_tensors(config), config)


@pytest.mark.parametrize("kind", ["hf", "phi3", "gguf"])
@pytest.mark.parametrize("sizes", [{"heads": 2}, {"rows": 2, "heads": 1}], ids=["heads", "rows"])
def test_slices_are_those_of_the_whole(tmp_path, monkeypatch, kind, sizes):
    path = checkpoint(tmp_path / "model", kind)
    _, whole = load_checkpoint(path, dtype="float32")
    read = count_reads(monkeypatch)
    found = Llama.from_pretrained(path, dtype="float32", mesh=make_mesh(**sizes)).params()
    assert list(found) == list(whole)
    for name, value in found.items():
        np.testing.assert_array_equal(value, whole[name])
    largest = max(value.nbytes for value in whole.values())
    total = sum(value.nbytes for value in whole.values())
    # What is not cut are the norms.
    for device in jax.devices():
        held = sum(s.data.nbytes for value in found.values() for s in value.addressable_shards if s.device == device)
        assert held <= total / 2 + whole["embed"].nbytes / 4
    # One slice of a stacked parameter, and slices of the file's tensors while threads fill it.
    assert max(read["parts"]) <= largest / 2 and max(read["stacks"]) <= largest / 2


def count_reads(monkeypatch):
    """Bytes of each part of a tensor that is read, and of each slice on its way to a device."""
    read = {"parts": [], "stacks": []}

    def counted(function, kind):
        def run(*arguments):
            found = function(*arguments)
            read[kind].append(found.nbytes)
            return found

        return run

    for owner in (hf_files.HFFiles, gguf_file.GGUFFile):
        monkeypatch.setattr(owner, "read_part", counted(owner.read_part, "parts"))
    monkeypatch.setattr(convert._SliceReader, "_read", counted(convert._SliceReader._read, "stacks"))
    return read


def test_numbers_that_are_not_finite_are_named(tmp_path):
    tensors = random_tensors(EVEN)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.inf
    path = write_hf(tmp_path / "model", tensors, EVEN)
    with pytest.raises(ValueError, match=r"NaN or infinite: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_checkpoint(path, mesh=make_mesh(heads=2))
