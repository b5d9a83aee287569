"""One clear error for each way in which a GGUF file can be broken or unsupported."""

import struct

import pytest
from checkpoints import CONFIG, random_tensors
from gguf_files import gguf_tensors, load, write_gguf

from minference_jax.checkpoints.gguf_file import GGUFFile


# Ways to break a good file: a function of its bytes, and what the error must say.
def replace(old, new, count=1):
    def apply(content):
        assert old in content
        return content.replace(old, new, count)

    return apply


def at(position, kind, value):
    def apply(content):
        return content[:position] + struct.pack(kind, value) + content[position + struct.calcsize(kind) :]

    return apply


def string(text):
    return struct.pack("<Q", len(text)) + text


def entry(name, dims, kind, offset):
    """A tensor's entry in the header."""
    numbers = b"".join(struct.pack("<Q", d) for d in dims)
    return string(name) + struct.pack("<I", len(dims)) + numbers + struct.pack("<IQ", kind, offset)


def norm_entry(dims=(6,), kind=0, offset=None):
    """Rewrites the entry of blk.0.attn_norm.weight."""

    def apply(content):
        start = content.index(string(b"blk.0.attn_norm.weight"))
        length = len(entry(b"blk.0.attn_norm.weight", (6,), 0, 0))
        old_offset = struct.unpack("<Q", content[start + length - 8 : start + length])[0]
        new = entry(b"blk.0.attn_norm.weight", dims, kind, old_offset if offset is None else offset)
        return content[:start] + new + content[start + length :]

    return apply


ARCHITECTURE = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")
BLOCKS = string(b"llama.block_count") + struct.pack("<II", 4, 2)
HEADS = string(b"llama.attention.head_count") + struct.pack("<II", 4, 3)
BROKEN = {
    "empty": (lambda c: b"", "only 0 bytes"),
    "magic only": (lambda c: c[:4], "only 4 bytes"),
    "bad magic": (replace(b"GGUF", b"GGML"), "it starts with b'GGML' instead of b'GGUF'"),
    "version 1": (at(4, "<I", 1), "GGUF version 1 is not supported; supported: 2, 3"),
    "big-endian": (at(4, ">I", 3), r"a big-endian file\?"),
    "absurd tensor count": (at(8, "<Q", 2**62), "announces 4,611,686,018,427,387,904 tensors"),
    "absurd metadata count": (at(16, "<Q", 2**63), "announces 9,223,372,036,854,775,808 metadata entries"),
    "one tensor too many": (at(8, "<Q", 22), "truncated or corrupt|dimensions"),
    "cut in the metadata": (lambda c: c[:100], "truncated or corrupt"),
    "cut in the tensors": (lambda c: c[:-64], r"truncated or corrupt: tensor '.*' ends at byte"),
    "key without end": (at(24, "<Q", 2**40), "a metadata key is 1,099,511,627,776 bytes long"),
    "key is not UTF-8": (replace(b"general.arch", b"\xff\xfeneral.arch"), "a metadata key is not UTF-8"),
    "string without end": (replace(string(b"llama"), struct.pack("<Q", 2**50) + b"llama"), "truncated or corrupt"),
    "unknown value type": (replace(HEADS, HEADS[:-8] + struct.pack("<II", 99, 3)), "has the unknown type 99"),
    "array without end": (
        replace(HEADS, HEADS[:-8] + struct.pack("<IIQ", 9, 4, 2**60)),
        "announces 1,152,921,504,606,846,976 values in 'llama.attention.head_count'",
    ),
    "strings without end": (
        replace(HEADS, HEADS[:-8] + struct.pack("<IIQ", 9, 8, 2**60)),
        "announces 1,152,921,504,606,846,976 strings",
    ),
    "array of arrays": (replace(HEADS, HEADS[:-8] + struct.pack("<IIQ", 9, 9, 1)), "elements of the unsupported type"),
    "unknown quantization": (norm_entry(kind=40), "unsupported type NVFP4; supported: F32, F16, Q4_0"),
    "row shorter than a block": (norm_entry(kind=8), r"shape \(6,\) cannot be stored as Q8_0 \(blocks of 32\)"),
    "no dimensions": (norm_entry(dims=()), "has 0 dimensions"),
    "absurd dimension": (norm_entry(dims=(2**62,)), "ends at byte"),
    "zero dimension": (norm_entry(dims=(0,)), r"shape \(0,\) cannot be stored"),
    "offset past the end": (norm_entry(offset=2**40), "ends at byte"),
    "offset off the grid": (norm_entry(offset=33), "not a multiple of 32"),
    "tensors overlap": (norm_entry(offset=32), "overlap"),
    "wrong shape": (norm_entry(dims=(5,)), r"blk\.0\.attn_norm\.weight \(5,\) instead of \(6,\)"),
    "other architecture": (
        replace(ARCHITECTURE, ARCHITECTURE.replace(b"llama", b"gemma")),
        "architecture 'gemma' is not supported; supported: llama, mistral3, qwen2, qwen3",
    ),
    "billions of layers": (
        replace(BLOCKS, BLOCKS[:-4] + struct.pack("<I", 2**32 - 1)),
        "num_hidden_layers must be less than 2,147,483,648, got 4,294,967,295",
    ),
    "sizes are missing": (
        replace(b"llama.attention.head_count\x04", b"llama.attention.head_kount\x04"),
        r"missing: llama\.attention\.head_count$",
    ),
    "unexpected tensor": (replace(b"blk.1.attn_v.weight", b"blk.1.attn_w.weight"), r"1 missing: .* 1 unexpected: "),
}  # fmt: skip


@pytest.fixture(scope="module")
def good_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    return write_gguf(path, gguf_tensors(random_tensors(CONFIG), CONFIG)).read_bytes()


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_give_one_error_that_names_the_file(tmp_path, good_file, case):
    apply, message = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(apply(good_file))
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_every_cut_is_noticed(tmp_path, good_file):
    """Wherever a download stops before the last byte of the last tensor, the file is refused."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(good_file)
    end = max(tensor.offset + tensor.num_bytes for tensor in GGUFFile(path).tensors.values())
    for length in (*range(0, end, 29), end - 1):
        path.write_bytes(good_file[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            load(path)


def test_random_damage_to_the_header_never_escapes_as_another_error(tmp_path, good_file, rng):
    path = tmp_path / "damaged.gguf"
    for _ in range(300):
        content = bytearray(good_file)
        for position in rng.integers(0, 1500, 3):
            content[position] = rng.integers(256)
        path.write_bytes(content)
        try:
            load(path)
        except ValueError as error:
            assert "damaged.gguf" in str(error)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("add_expert_count", 8), "mixtures of experts of architecture 'qwen2'"),
        (("add_uint16", "split.count", 3), "a part of 3 is named NAME-0000i-of-00003.gguf"),
    ],
)
def test_models_that_are_not_supported(tmp_path, extra, message):
    config = CONFIG | {"model_type": "qwen2"}
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(random_tensors(config), config), config, [extra])
    with pytest.raises(ValueError, match=message):
        load(path)
