"""Every quantization of GGUF, against its definition in plain NumPy."""

import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, random_tensors
from gguf import GGMLQuantizationType as Type
from gguf_files import gguf_tensors, load, write_gguf

from minference_jax.checkpoints.gguf_file import GGUFFile
from minference_jax.models.config import LlamaConfig


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
    with pytest.raises(
        ModuleNotFoundError, match=r"m\.gguf: reading Q8_0 tensors needs gguf: pip install 'minference-jax\[gguf\]'"
    ):
        file.read("quantized")
