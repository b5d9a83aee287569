"""GGUF files: metadata to config, row order, every quantization, and one clear error for each way to be broken."""

import struct
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from minference_jax.models.config import LlamaConfig
from minference_jax.models.convert import load_checkpoint
from minference_jax.models.gguf_file import GGUFFile
from tests.checkpoints import CONFIG, random_tensors

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def interleave(rows, heads):
    """What llama.cpp's converter does to q and k: within each head, the first half's rows between the second's."""
    first, second = np.split(rows.reshape(heads, -1, *rows.shape[1:]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(rows.shape)


def gguf_tensors(tensors, config):
    """Hugging Face tensors under GGUF's names, in GGUF's row order."""
    result = {}
    for name, tensor in tensors.items():
        if config["model_type"] == "llama" and "q_proj" in name:
            tensor = interleave(tensor, config["num_attention_heads"])
        if config["model_type"] == "llama" and "k_proj" in name:
            tensor = interleave(tensor, config["num_key_value_heads"])
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        result[name] = tensor
    return result


def write_gguf(path, tensors, config=CONFIG, extra=(), raw_types=None):
    """A GGUF file of a config in Hugging Face's terms; `extra` calls more of the writer's methods."""
    family = config["model_type"]
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for method, *arguments in extra:
        getattr(writer, method)(*arguments)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(raw_types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path):
    return load_checkpoint(path, dtype="float32")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_gguf_and_hugging_face_give_the_same_parameters(tmp_path, family):
    from tests.checkpoints import write_hf

    config = CONFIG | {"model_type": family, "sliding_window": None, "pad_token_id": None}
    tensors = random_tensors(config)
    expected_config, expected = load(write_hf(tmp_path / "hf", tensors, config))
    actual_config, actual = load(write_gguf(tmp_path / "model.gguf", gguf_tensors(tensors, config), config))
    assert actual_config == expected_config
    assert list(actual) == list(expected)
    for name, param in expected.items():
        np.testing.assert_array_equal(np.asarray(actual[name]), np.asarray(param), err_msg=name)


def test_llama_rows_are_put_back_in_order(tmp_path):
    """One head of 4: the file's rows 0 1 2 3 are Hugging Face's 0 2 1 3."""
    tensors = gguf_tensors(random_tensors(CONFIG), CONFIG)
    _, params = load(write_gguf(tmp_path / "model.gguf", tensors))
    in_file = tensors["blk.0.attn_k.weight"]
    np.testing.assert_array_equal(np.asarray(params["layers.wk"])[0, :, 0].T, in_file[[0, 2, 1, 3]])


def test_missing_output_weight_means_tied_embeddings(tmp_path):
    tensors = gguf_tensors(random_tensors(CONFIG), CONFIG)
    del tensors["output.weight"]
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "only.gguf", tensors)
    config, params = load(tmp_path / "model")  # a directory with one GGUF file is as good as the file
    assert config.tie_embeddings
    assert "lm_head" not in params


def test_directory_with_two_files_is_ambiguous(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); name one"):
        load(tmp_path)


def llama3_divisors(theta, factor, dims):
    """As the Llama 3.1 model code scales its frequencies, one wavelength at a time."""
    divisors = []
    for i in range(0, dims, 2):
        wavelength = 2 * np.pi * theta ** (i / dims)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, "float32")


@pytest.mark.parametrize(("factor", "kind"), [(8.0, "llama3"), (32.0, "llama3"), (1.0, "default")])
def test_llama3_scaling_is_recognized_from_its_divisors(tmp_path, factor, kind):
    config = CONFIG | {"head_dim": 64, "rope_theta": 500000.0}
    tensors = gguf_tensors(random_tensors(config), config)
    tensors["rope_freqs.weight"] = llama3_divisors(500000.0, factor, 64)
    rope = load(write_gguf(tmp_path / "model.gguf", tensors, config))[0].rope
    assert rope.kind == kind
    assert rope.factor == factor
    if kind == "llama3":
        assert (rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings) == (1, 4, 8192)


def test_other_divisors_are_refused(tmp_path):
    tensors = gguf_tensors(random_tensors(CONFIG), CONFIG) | {"rope_freqs.weight": np.array([1, 3], "float32")}
    with pytest.raises(ValueError, match="divisors that are not Llama 3's"):
        load(write_gguf(tmp_path / "model.gguf", tensors))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_from_metadata(tmp_path, kind):
    extra = [("add_rope_scaling_type", gguf.RopeScalingType(kind)), ("add_rope_scaling_factor", 4.0)]
    extra += [("add_rope_scaling_orig_ctx_len", 16)]
    tensors = gguf_tensors(random_tensors(CONFIG), CONFIG)
    rope = load(write_gguf(tmp_path / "model.gguf", tensors, extra=extra))[0].rope
    assert (rope.kind, rope.factor) == (kind, 4.0)
    assert rope.original_max_position_embeddings == (16 if kind == "yarn" else None)


def test_longrope_factors_are_tensors(tmp_path):
    config = CONFIG | {"model_type": "phi3"}
    tensors = gguf_tensors(random_tensors(config), config)
    tensors["rope_factors_long.weight"] = np.array([2.0, 8.0], "float32")
    tensors["rope_factors_short.weight"] = np.array([1.0, 1.5], "float32")
    rope = load(write_gguf(tmp_path / "m.gguf", tensors, config, [("add_rope_scaling_orig_ctx_len", 16)]))[0].rope
    assert (rope.kind, rope.long_factor, rope.short_factor) == ("longrope", (2.0, 8.0), (1.0, 1.5))
    assert rope.original_max_position_embeddings == 16


def test_tokens_that_end_a_turn_end_generation(tmp_path):
    tensors = gguf_tensors(random_tensors(CONFIG), CONFIG)
    config, _ = load(write_gguf(tmp_path / "model.gguf", tensors, extra=[("add_eot_token_id", 9)]))
    assert config.eos_token_ids == (2, 9)


# Quantizations. Blocks of random bytes, with scales that are finite, decoded one value at a time as ggml defines them.
def f16(raw):
    return float(np.frombuffer(bytes(raw), "<f2")[0])


def slow_q4_0(b):
    return [f16(b[:2]) * (n - 8) for n in [x & 15 for x in b[2:]] + [x >> 4 for x in b[2:]]]


def slow_q4_1(b):
    return [f16(b[:2]) * n + f16(b[2:4]) for n in [x & 15 for x in b[4:]] + [x >> 4 for x in b[4:]]]


def slow_q8_0(b):
    return [f16(b[:2]) * (x - 256 if x > 127 else x) for x in b[2:]]


def slow_q4_k(b):
    d, least, scales, quants = f16(b[:2]), f16(b[2:4]), b[4:16], b[16:]
    values = []
    for j in range(8):  # sub-blocks of 32; two of them share bytes, low and high halves
        if j < 4:
            scale, minimum = scales[j] & 63, scales[j + 4] & 63
        else:
            scale = (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4
            minimum = (scales[j + 4] >> 4) | (scales[j] >> 6) << 4
        for x in quants[j // 2 * 32 : j // 2 * 32 + 32]:
            values.append(d * scale * (x >> 4 if j % 2 else x & 15) - least * minimum)
    return values


def slow_q6_k(b):
    low, high, scales, d = b[:128], b[128:192], np.frombuffer(bytes(b[192:208]), "i1"), f16(b[208:210])
    values = np.zeros(256)
    for half in range(2):
        for i in range(32):
            top = high[32 * half + i]
            for quarter in range(4):
                x = low[64 * half + 32 * (quarter % 2) + i]
                q = (x & 15 if quarter < 2 else x >> 4) | (top >> 2 * quarter & 3) << 4
                at = 128 * half + 32 * quarter + i
                values[at] = d * int(scales[at // 16]) * (q - 32)
    return values.tolist()


SLOW = {
    "Q4_0": (slow_q4_0, 32, 18, (0,)),
    "Q4_1": (slow_q4_1, 32, 20, (0, 2)),
    "Q8_0": (slow_q8_0, 32, 34, (0,)),
    "Q4_K": (slow_q4_k, 256, 144, (0, 2)),
    "Q6_K": (slow_q6_k, 256, 210, (208,)),
}


@pytest.mark.parametrize("kind", SLOW)
def test_quantized_blocks_decode_as_defined(tmp_path, rng, kind):
    decode, block, block_bytes, scale_positions = SLOW[kind]
    blocks = rng.integers(0, 256, (3, 2, block_bytes), dtype="uint8")  # 3 rows of 2 blocks
    for at in scale_positions:
        blocks[..., at : at + 2] = rng.uniform(0.01, 1, (3, 2, 1)).astype("<f2").view("uint8").reshape(3, 2, 2)
    rows = blocks.reshape(3, -1)
    path = write_gguf(tmp_path / "m.gguf", {"x": rows}, raw_types={"x": Type[kind]})
    tensor = GGUFFile(path).read("x")
    assert tensor.shape == (3, 2 * block)
    expected = [[value for b in row for value in decode([int(x) for x in b])] for row in blocks]
    np.testing.assert_allclose(tensor, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32"])
def test_every_type_comes_close_to_what_was_stored(tmp_path, rng, kind):
    x = rng.standard_normal((4, 64)).astype("float32")
    stored = x.astype("f2") if kind == "F16" else x if kind == "F32" else gguf.quantize(x, Type[kind])
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", {"x": stored}, raw_types={"x": Type[kind]}))
    assert file.tensors["x"].type == kind
    tensor = file.read("x")
    assert tensor.dtype == {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind, np.float32)
    worst = {"Q4": 0.3, "Q5": 0.15, "Q8": 0.02, "BF": 0.01, "F1": 0.002, "F3": 0.0}[kind[:2]]
    assert np.abs(tensor.astype("float32") - x).max() <= worst


def test_a_quantized_model_loads(tmp_path):
    config = CONFIG | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 32}
    tensors = gguf_tensors(random_tensors(config), config)
    matrices = {name for name, t in tensors.items() if t.ndim == 2}
    stored = {name: gguf.quantize(t, Type.Q8_0) if name in matrices else t for name, t in tensors.items()}
    path = write_gguf(tmp_path / "m.gguf", stored, config, raw_types=dict.fromkeys(matrices, Type.Q8_0))
    loaded, params = load(path)
    assert loaded == LlamaConfig.from_hf(config)
    np.testing.assert_allclose(np.asarray(params["lm_head"]), tensors["output.weight"].T, atol=0.02)


def test_without_the_gguf_package_only_quantized_tensors_are_out_of_reach(tmp_path, monkeypatch):
    x = np.ones((2, 32), "float32")
    tensors = {"plain": x, "quantized": gguf.quantize(x, Type.Q8_0)}
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", tensors, raw_types={"quantized": Type.Q8_0}))
    monkeypatch.setitem(sys.modules, "gguf", None)
    np.testing.assert_array_equal(file.read("plain"), x)
    with pytest.raises(ImportError, match=r"m\.gguf: reading Q8_0 tensors needs the 'gguf' package"):
        file.read("quantized")


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
    "unknown quantization": (norm_entry(kind=16), "unsupported type number 16; supported: F32, F16, Q4_0"),
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
        "architecture 'gemma' is not supported; supported: llama, qwen2, qwen3, phi3",
    ),
    "billions of layers": (
        replace(BLOCKS, BLOCKS[:-4] + struct.pack("<I", 2**32 - 1)),
        "4,294,967,295 layers, but the checkpoint holds 21 tensors",
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
        (("add_expert_count", 8), "mixture-of-experts"),
        (("add_uint16", "split.count", 3), "one part of a split GGUF model"),
        (("add_sliding_window", 16), "sliding_window 16"),
    ],
)
def test_models_that_are_not_supported(tmp_path, extra, message):
    config = CONFIG | {"model_type": "qwen2"}
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(random_tensors(config), config), config, [extra])
    with pytest.raises(ValueError, match=message):
        load(path)
