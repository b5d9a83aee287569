"""Hugging Face checkpoints in and out: layouts, shards, tied heads, and one clear error for each way to be broken."""

import dataclasses
import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, hf_shapes, random_tensors, write_hf
from safetensors.numpy import load_file, save_file
from variants import VARIANTS

from minference_jax.checkpoints.convert import load_checkpoint, save_checkpoint
from minference_jax.models import fp8
from minference_jax.models.config import LlamaConfig
from minference_jax.models.llama import Llama
from minference_jax.models.params import param_shapes


def random_params(config, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape).astype("float32"), dtype)
        for name, shape in param_shapes(config).items()
    }


def assert_same_params(actual, expected):
    assert list(actual) == list(expected)
    for name, param in expected.items():
        assert actual[name].dtype == param.dtype, name
        np.testing.assert_array_equal(np.asarray(actual[name]), np.asarray(param), err_msg=name)


def test_every_number_lands_where_the_definition_puts_it(tmp_path):
    tensors = random_tensors(CONFIG)
    config, params = load_checkpoint(write_hf(tmp_path / "model", tensors), dtype="float32")
    assert config == LlamaConfig.from_hf(CONFIG)
    p = {name: np.asarray(param) for name, param in params.items()}
    np.testing.assert_array_equal(p["embed"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(p["final_norm"], tensors["model.norm.weight"])
    np.testing.assert_array_equal(p["lm_head"], tensors["lm_head.weight"].T)
    for i in range(2):
        layer = {name[len("model.layers.0.") :]: t for name, t in tensors.items() if f"layers.{i}." in name}
        # Hugging Face keeps [out, in]; row n * head_dim + h of a projection is dimension h of head n.
        for n in range(3):
            for h in range(4):
                np.testing.assert_array_equal(p["layers.wq"][i, :, n, h], layer["self_attn.q_proj.weight"][4 * n + h])
                np.testing.assert_array_equal(p["layers.wo"][i, n, h], layer["self_attn.o_proj.weight"][:, 4 * n + h])
        for h in range(4):
            np.testing.assert_array_equal(p["layers.wk"][i, :, 0, h], layer["self_attn.k_proj.weight"][h])
            np.testing.assert_array_equal(p["layers.wv"][i, :, 0, h], layer["self_attn.v_proj.weight"][h])
        for ours, theirs in (("w_gate", "gate_proj"), ("w_up", "up_proj"), ("w_down", "down_proj")):
            np.testing.assert_array_equal(p[f"layers.{ours}"][i], layer[f"mlp.{theirs}.weight"].T)
        np.testing.assert_array_equal(p["layers.attn_norm"][i], layer["input_layernorm.weight"])
        np.testing.assert_array_equal(p["layers.mlp_norm"][i], layer["post_attention_layernorm.weight"])


def test_phi3_splits_its_fused_projections(tmp_path):
    config = CONFIG | {"model_type": "phi3", "sliding_window": None, "pad_token_id": 0}
    tensors = random_tensors(config)
    _, params = load_checkpoint(write_hf(tmp_path / "model", tensors, config), dtype="float32")
    qkv, gate_up = (tensors[f"model.layers.1.{name}.weight"] for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    # 3 query heads, 1 key head, 1 value head of 4 rows each; then 5 rows of gate and 5 of up.
    np.testing.assert_array_equal(np.asarray(params["layers.wq"])[1], qkv[:12].T.reshape(6, 3, 4))
    np.testing.assert_array_equal(np.asarray(params["layers.wk"])[1], qkv[12:16].T.reshape(6, 1, 4))
    np.testing.assert_array_equal(np.asarray(params["layers.wv"])[1], qkv[16:].T.reshape(6, 1, 4))
    np.testing.assert_array_equal(np.asarray(params["layers.w_gate"])[1], gate_up[:5].T)
    np.testing.assert_array_equal(np.asarray(params["layers.w_up"])[1], gate_up[5:].T)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_biases_and_head_norms(tmp_path, family):
    config = CONFIG | {"model_type": family}
    tensors = random_tensors(config)
    _, params = load_checkpoint(write_hf(tmp_path / "model", tensors, config), dtype="float32")
    if family == "qwen2":
        bias = tensors["model.layers.1.self_attn.q_proj.bias"]
        np.testing.assert_array_equal(np.asarray(params["layers.bq"])[1], bias.reshape(3, 4))
    else:
        np.testing.assert_array_equal(
            np.asarray(params["layers.k_norm"])[1], tensors["model.layers.1.self_attn.k_norm.weight"]
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_then_load_gives_the_same_model(tmp_path, variant):
    config = LlamaConfig.from_hf(VARIANTS[variant])
    params = random_params(config)
    save_checkpoint(config, params, tmp_path / "model")
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert names == set(hf_shapes(config.to_hf()))
    loaded, loaded_params = load_checkpoint(tmp_path / "model", dtype="float32")
    assert loaded == config
    assert_same_params(loaded_params, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_are_kept_and_cast(tmp_path, dtype):
    config = LlamaConfig.from_hf(CONFIG)
    params = random_params(config, dtype)
    save_checkpoint(config, params, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == dtype
    assert_same_params(load_checkpoint(tmp_path / "model", dtype=dtype)[1], params)
    widened = load_checkpoint(tmp_path / "model", dtype="float32")[1]
    assert_same_params(widened, {name: param.astype("float32") for name, param in params.items()})


def test_shards_with_and_without_an_index(tmp_path):
    config = LlamaConfig.from_hf(CONFIG)
    params = random_params(config)
    directory = tmp_path / "model"
    save_checkpoint(config, params, directory, max_shard_bytes=500)
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 500 for shard in shards)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["metadata"]["total_size"] == sum(param.nbytes for param in params.values())
    assert_same_params(load_checkpoint(directory, dtype="float32")[1], params)

    (directory / "model.safetensors.index.json").unlink()
    assert_same_params(load_checkpoint(directory, dtype="float32")[1], params)
    shards[1].unlink()
    with pytest.raises(ValueError, match=r"shards are not complete: missing \['model-00002-of-"):
        load_checkpoint(directory)


TIED = CONFIG | {"tie_word_embeddings": True}


def test_tied_head_equal_to_the_embedding_is_dropped(tmp_path):
    tensors = random_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    config, params = load_checkpoint(write_hf(tmp_path / "model", tensors, TIED), dtype="float32")
    assert config.tie_embeddings
    assert "lm_head" not in params


def test_tied_head_unlike_the_embedding_is_kept(tmp_path):
    tensors = random_tensors(CONFIG)
    config, params = load_checkpoint(write_hf(tmp_path / "model", tensors, TIED), dtype="float32")
    assert not config.tie_embeddings
    np.testing.assert_array_equal(np.asarray(params["lm_head"]), tensors["lm_head.weight"].T)


def test_tied_embedding_is_taken_from_the_head(tmp_path):
    tensors = random_tensors(TIED)
    embedding = tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    config, params = load_checkpoint(write_hf(tmp_path / "model", tensors, TIED), dtype="float32")
    assert config.tie_embeddings
    np.testing.assert_array_equal(np.asarray(params["embed"]), embedding)


def test_rope_tables_of_old_checkpoints_are_ignored(tmp_path):
    tensors = random_tensors(CONFIG)
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        tensors[name] = np.ones(2, "float32")
    _, params = load_checkpoint(write_hf(tmp_path / "model", tensors))
    assert set(params) == set(param_shapes(LlamaConfig.from_hf(CONFIG)))


def test_generation_config_adds_the_tokens_that_end_a_turn(tmp_path):
    directory = write_hf(tmp_path / "model", random_tensors(CONFIG))
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_checkpoint(directory)[0].eos_token_ids == (2, 7)


def test_every_trouble_with_names_is_in_one_message(tmp_path):
    tensors = random_tensors(CONFIG)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((5, 6), "float32")
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((6, 12), "float32")
    with pytest.raises(ValueError) as caught:
        load_checkpoint(write_hf(tmp_path / "model", tensors))
    message = str(caught.value)
    assert str(tmp_path / "model") in message
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "1 unexpected: model.layers.2.mlp.up_proj.weight" in message
    assert "1 wrongly shaped: model.layers.0.self_attn.q_proj.weight (6, 12) instead of (12, 6)" in message


def test_long_lists_of_names_are_cut(tmp_path):
    config = CONFIG | {"num_hidden_layers": 20}
    with pytest.raises(ValueError, match=r"162 missing: .*, \.\.\.$") as caught:
        load_checkpoint(write_hf(tmp_path / "model", random_tensors(CONFIG), config))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6], ids=["nan", "inf", "too large for float16"])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    tensors = random_tensors(CONFIG)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    with pytest.raises(ValueError, match=r"1 NaN or infinite: model\.layers\.1\.mlp\.up_proj\.weight$"):
        load_checkpoint(write_hf(tmp_path / "model", tensors), dtype="float16")


def test_projections_are_quantized_as_they_are_read(tmp_path):
    path = write_hf(tmp_path / "model", random_tensors(CONFIG))
    _, params = load_checkpoint(path, dtype="float32")
    narrow = Llama.from_pretrained(path, dtype="float32", fp8_projections=True)
    expected = fp8.quantize_params(params)
    assert narrow.fp8_projections and list(narrow.params()) == list(expected)
    for name, value in narrow.params().items():
        np.testing.assert_array_equal(value.astype(jnp.float32), expected[name].astype(jnp.float32), err_msg=name)


def test_progress_counts_tensors(tmp_path):
    calls = []
    tensors = random_tensors(CONFIG)
    load_checkpoint(write_hf(tmp_path / "model", tensors), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, len(tensors)) for i in range(len(tensors))]


def test_unsupported_dtype():
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32, got 'int8'"):
        load_checkpoint("anywhere", dtype="int8")


# Ways to break a good checkpoint directory: a function of the directory, and what the error must say.
def cut_weights(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def set_header(header_bytes, length=None):
    def apply(directory):
        size = len(header_bytes) if length is None else length
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", size) + header_bytes + bytes(64))

    return apply


def header(**offsets):
    entries = {name: {"dtype": "F32", "shape": [4], "data_offsets": pair} for name, pair in offsets.items()}
    return json.dumps(entries).encode()


def put(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def set_config(**changes):
    return lambda directory: (directory / "config.json").write_text(json.dumps(CONFIG | changes))


def index_of(shard):
    def apply(directory):
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))

    return apply


def pickle_only(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def integer_weights(directory):
    tensors = random_tensors(CONFIG)
    tensors["model.norm.weight"] = np.ones(6, "int32")
    save_file(tensors, directory / "model.safetensors")


def weights_are_a_directory(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()


def same_tensor_twice(directory):
    tensors = random_tensors(CONFIG)
    (directory / "model.safetensors").unlink()
    for i in (1, 2):
        save_file(tensors, directory / f"model-0000{i}-of-00002.safetensors")


WEIGHTS = r"model\.safetensors: not a whole, valid safetensors file"
BROKEN = {
    "weights are empty": (put("model.safetensors", b""), WEIGHTS),
    "weights are cut off": (cut_weights, WEIGHTS),
    "header longer than the file": (set_header(b"{}", 10_000), WEIGHTS),
    "header absurdly long": (set_header(b"{}", 2**63), WEIGHTS),
    "header is not JSON": (set_header(b"hello"), WEIGHTS),
    "header is not UTF-8": (set_header(b"\xff\xfe{}"), WEIGHTS),
    "offsets past the end": (set_header(header(a=[0, 16], b=[16, 1600])), WEIGHTS),
    "offsets overlap": (set_header(header(a=[0, 16], b=[8, 24])), WEIGHTS),
    "negative offset": (set_header(header(a=[-16, 0])), WEIGHTS),
    "weights are a directory": (weights_are_a_directory, WEIGHTS),
    "integer weights": (
        integer_weights,
        r"model\.norm\.weight has dtype I32 \(supported: F64, F32, F16, BF16\); the config says llama, not quantized",
    ),
    "a tensor in two files": (same_tensor_twice, "is in more than one file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"no model\.safetensors, no .* and no shards"),
    "only a pickle": (pickle_only, r"pytorch_model\.bin: .* pickles, which can run any code"),
    "shard is missing": (index_of("model-00001-of-00001.safetensors"), "1 of 1 shards are missing"),
    "shard outside": (index_of("../model.safetensors"), r"'\.\./model\.safetensors' is not the name of"),
    "shard is absolute": (index_of("/etc/passwd"), "'/etc/passwd' is not the name of a safetensors file"),
    "shard is a pickle": (index_of("pytorch_model.bin"), r"'pytorch_model\.bin' is not the name of a safetensors file"),
    "shard is a number": (index_of(7), "weight_map must map tensor names to file names"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json does not exist"),
    "config is not JSON": (put("config.json", b"{'a': 1}"), r"config\.json: not valid JSON"),
    "config is nested without end": (put("config.json", b"[" * 100_000), r"config\.json: not valid JSON"),
    "config is a list": (put("config.json", b"[]"), r"config\.json: expected a JSON object, found list"),
    "config is not UTF-8": (put("config.json", b"\xff{}"), r"config\.json: not valid JSON"),
    "other architecture": (set_config(model_type="gpt2"), "model_type 'gpt2' is not supported"),
    "quantized": (set_config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "billions of layers": (set_config(num_hidden_layers=10**9), "num_hidden_layers 1,000,000,000"),
    "config of a larger model": (set_config(hidden_size=60), "wrongly shaped"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directories_give_one_error_that_names_the_place(tmp_path, case):
    directory = write_hf(tmp_path / "model", random_tensors(CONFIG))
    apply, message = BROKEN[case]
    apply(directory)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist"),
        ("weights.bin", "pickles"),
        ("weights.safetensors", "give the directory"),
        ("notes.txt", "neither a GGUF file nor a checkpoint directory"),
    ],
)
def test_paths_that_are_no_checkpoint(tmp_path, name, message):
    if name != "nowhere":
        (tmp_path / name).write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / name)


def test_saving_refuses_what_it_would_overwrite_and_leaves_nothing_behind(tmp_path):
    config = LlamaConfig.from_hf(CONFIG)
    params = random_params(config)
    (tmp_path / "model").mkdir()  # an empty directory is as good as none
    save_checkpoint(config, params, tmp_path / "model")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_checkpoint(config, params, tmp_path / "model")
    with pytest.raises(ValueError, match=r"'lm_head': \(\(6, 11\), None\)"):
        save_checkpoint(dataclasses.replace(config, tie_embeddings=True), params, tmp_path / "other")
    with pytest.raises(ValueError, match=r"tokenizer_from: .* holds no tokenizer"):
        save_checkpoint(config, params, tmp_path / "other", tokenizer_from=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_bfloat16_survives_bit_for_bit(tmp_path):
    """Every one of the 65,536 patterns that is finite, through file, transposition and stack."""
    patterns = np.arange(2**16, dtype="uint16").view(ml_dtypes.bfloat16)
    finite = patterns[np.isfinite(patterns)]
    config = CONFIG | {"vocab_size": len(finite) // 6}
    tensors = {name: t.astype(ml_dtypes.bfloat16) for name, t in random_tensors(config).items()}
    tensors["lm_head.weight"] = finite[: len(finite) // 6 * 6].reshape(-1, 6)
    _, params = load_checkpoint(write_hf(tmp_path / "model", tensors, config))
    actual = np.asarray(params["lm_head"]).T.view("uint16")
    np.testing.assert_array_equal(actual, tensors["lm_head.weight"].view("uint16"))
