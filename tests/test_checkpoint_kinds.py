"""Checkpoints as people have them: what a GGUF file leaves unsaid, foreign formats, input that does not fit."""

import json
import warnings

import gguf
import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, random_tensors, write_byte_model, write_hf
from gguf_files import gguf_tensors, write_gguf
from helpers import run_command as run
from test_tokenizer import MERGES, bpe_metadata, sentencepiece_metadata

from minference_jax import Llama, generate, load_tokenizer
from minference_jax.checkpoints.convert import load_checkpoint, open_checkpoint
from minference_jax.checkpoints.gguf_config import eos_token_ids
from minference_jax.text.gguf_pre_tokenizers import PRE_TOKENIZERS
from minference_jax.text.gguf_tokenizer import build_tokenizer, tokenizer_config
from minference_jax.text.tokenizer import Tokenizer

# -- what llama.cpp infers from a GGUF file's names and texts


@pytest.mark.parametrize("turn", ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "[EOT]"])
def test_the_end_of_a_turn_is_found_by_its_text(turn):
    tokens = ["a", "<|endoftext|>", turn]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 0}
    assert set(eos_token_ids(metadata)) == {0, 1, 2}


def test_some_texts_end_nothing_beside_others():
    assert eos_token_ids({"tokenizer.ggml.tokens": ["<|end|>", "<|return|>", "<|call|>"]}) == [1, 2]


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_file_without_a_pre_tokenizer_is_read_with_a_warning(pre):
    metadata = bpe_metadata(pre, MERGES)
    with pytest.warns(UserWarning, match="cut elsewhere than the model learned"):
        tokenizer = build_tokenizer(metadata)
    assert tokenizer.encode("ab  1234").tokens == ["ab", "Ġ", "Ġ", "123", "4"]  # llama.cpp's rule, not GPT-2's


def test_every_pre_tokenizer_loses_no_text():
    text = "Don't CAN'T\n\n  x1y22 3.14159, 2,048…  Grüße 日本語 한국어 \t\t<>|`~^ ends  \n"
    for name in PRE_TOKENIZERS:
        if name == "default":
            continue
        tokenizer = build_tokenizer(bpe_metadata(name, MERGES))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text, name


def test_phi3s_tokens_swallow_the_white_space_after_them():
    metadata = sentencepiece_metadata() | {"general.architecture": "phi3"}
    metadata["tokenizer.ggml.tokens"] = ["<unk>", "<s>", "<|user|>", *metadata["tokenizer.ggml.tokens"][3:]]
    ids = build_tokenizer(metadata).encode("<|user|>\n abc", add_special_tokens=False).ids
    assert [metadata["tokenizer.ggml.tokens"][i] for i in ids] == ["<|user|>", "▁a", "bc"]
    metadata["general.architecture"] = "llama"
    assert "<0x0A>" in build_tokenizer(metadata).encode("<|user|>\nabc", add_special_tokens=False).tokens


def test_named_chat_templates_of_a_gguf_file():
    metadata = bpe_metadata("gpt-2", MERGES) | {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "tools",
    }
    found = tokenizer_config(metadata)["chat_template"]
    assert found == [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]


@pytest.mark.parametrize("kind", ["IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_XXS", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4"])
def test_every_type_that_the_gguf_package_decodes_is_read(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    config = CONFIG | {"intermediate_size": 256}
    tensors = gguf_tensors(random_tensors(config), config)
    tensors["blk.0.ffn_down.weight"] = np.zeros((config["hidden_size"], 256 // block * size), np.uint8)
    path = write_gguf(tmp_path / "m.gguf", tensors, config, raw_types={"blk.0.ffn_down.weight": kind})
    _, params = load_checkpoint(path, dtype="float32")
    assert params["layers.w_down"].shape == (2, 256, 6) and np.isfinite(params["layers.w_down"]).all()


def test_a_split_gguf_model_is_read_as_one(tmp_path):
    tensors = gguf_tensors(random_tensors(CONFIG), CONFIG)
    whole, expected = load_checkpoint(write_gguf(tmp_path / "whole.gguf", tensors), dtype="float32")
    (tmp_path / "split").mkdir()
    names = list(tensors)
    for part in (0, 1):
        split = [("add_uint16", "split.no", part), ("add_uint16", "split.count", 2)]
        split.append(("add_int32", "split.tensors.count", len(tensors)))
        path = tmp_path / "split" / f"m-{part + 1:05d}-of-00002.gguf"
        write_gguf(path, {name: tensors[name] for name in names[part::2]}, extra=split)
    for place in (tmp_path / "split", tmp_path / "split" / "m-00002-of-00002.gguf"):
        config, params = load_checkpoint(place, dtype="float32")
        assert config == whole
        for name, value in expected.items():
            np.testing.assert_array_equal(params[name], value)
    (tmp_path / "split" / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 parts are missing: m-00001-of-00002\.gguf"):
        load_checkpoint(tmp_path / "split")


# -- input that is out of range, and the order of checks


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_byte_model(tmp_path_factory.mktemp("bytes"), special=("<s>", "</s>"))


@pytest.fixture(scope="module")
def model(directory):
    return Llama.from_pretrained(directory, dtype="float32")


@pytest.mark.parametrize("ids", [[[5, 300]], [[5, -7]], np.array([[5, 2**32 - 1]], np.uint32), [[1, 2], [300]]])
def test_ids_outside_the_vocabulary_are_an_error(model, ids):
    with pytest.raises(ValueError, match=r"outside the vocabulary of 258: tokens\["):
        generate(model, ids, max_new_tokens=1)


def test_a_prompt_beyond_the_context_is_a_warning_or_an_error(model):
    with pytest.warns(
        UserWarning, match=r"1,030 tokens and 2 new ones exceed the model's context of 1024 .*'factor': 2"
    ):
        generate(model, [[7] * 1030], max_new_tokens=2, eos_token_ids=())
    with pytest.raises(ValueError, match="context of 1024"):
        generate(model, [[7] * 1030], max_new_tokens=2, strict=True)


def test_rope_scaling_given_at_load_takes_the_place_of_the_checkpoints(directory):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    config, _ = load_checkpoint(directory, rope_scaling=scaling)
    assert (config.rope.kind, config.context_length) == ("yarn", 4096)


def test_prompts_of_unequal_length_are_padded(model):
    both = generate(model, [[3, 4, 5], [6]], max_new_tokens=3, eos_token_ids=())
    for row, prompt in enumerate(([3, 4, 5], [6])):
        alone = generate(model, [prompt], max_new_tokens=3, eos_token_ids=())
        assert both.sequences()[row] == alone.sequences()[0]
    encoded = {"input_ids": [[3, 4, 5], [6, 0, 0]], "attention_mask": [[1, 1, 1], [1, 0, 0]]}
    assert generate(model, encoded, max_new_tokens=3, eos_token_ids=()).sequences() == both.sequences()
    with pytest.raises(ValueError, match="pad on the right"):
        generate(model, {"input_ids": [[0, 4]], "attention_mask": [[0, 1]]}, max_new_tokens=1)


def test_single_numbers_serve_where_lists_are_documented(model):
    options = {"max_new_tokens": 2, "temperature": 1.0}
    seeded = generate(model, [[5]], eos_token_ids=2, key=0, pad_token_id=-1, **options)
    assert seeded.sequences() == generate(model, [[5]], eos_token_ids=(2,), **options).sequences()
    with pytest.raises(TypeError, match="key must be a seed or a key"):
        generate(model, [[5]], key="seed", **options)
    with pytest.raises(TypeError, match="eos_token_ids must be integers"):
        generate(model, [[5]], eos_token_ids="</s>", **options)


def test_the_tokenizer_is_asked_for_before_weights_are_read(tmp_path, capsys):
    tensors = random_tensors(CONFIG)
    tensors["lm_head.weight"][:] = np.nan
    status, _, news = run(capsys, "generate", write_hf(tmp_path / "m", tensors), "hi")
    assert status == 1 and "holds no tokenizer" in news


def narrow(kind):
    return {name: value.astype(kind) if "proj" in name else value for name, value in random_tensors(CONFIG).items()}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8 .a quantized checkpoint"),
        ({"quantization": {"bits": 4}}, "a quantized checkpoint"),
        ({"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}}, "'deepseek_v3'"),
        ({"model_type": "qwen3_next"}, "'qwen3_next'"),
        ({"model_type": "qwen3_5_moe"}, "'qwen3_5_moe'"),
    ],
)
def test_what_the_config_tells_is_said_first(tmp_path, change, word):
    path = write_hf(tmp_path / "m", narrow(ml_dtypes.float8_e4m3fn), CONFIG | change)
    with pytest.raises(ValueError, match=word) as error:
        open_checkpoint(path)
    assert "F8_E4M3" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("adapter_config.json", "an adapter"),
        ("params.json", "author's own layout"),
        ("model_index.json", "a diffusion pipeline"),
        ("model.onnx", "an ONNX model"),
    ],
)
def test_foreign_formats_are_named(tmp_path, file, word):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=word):
        open_checkpoint(tmp_path)


# -- refused though it cannot matter


@pytest.mark.parametrize("prefix", ["", "language_model.model."])
def test_whatever_stands_before_the_layers_names(tmp_path, prefix):
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = random_tensors(config)
    _, expected = load_checkpoint(write_hf(tmp_path / "a", tensors, config), dtype="float32")
    renamed = {prefix + name.removeprefix("model."): value for name, value in tensors.items()}
    _, params = load_checkpoint(write_hf(tmp_path / "b", renamed, config), dtype="float32")
    for name, value in expected.items():
        np.testing.assert_array_equal(params[name], value)


def test_buffers_and_scales_are_no_weights(tmp_path):
    tensors = random_tensors(CONFIG)
    for name in ("self_attn.rotary_emb.inv_freq", "self_attn.k_scale", "self_attn.v_proj.v_scale", "self_attn.bias"):
        tensors[f"model.layers.0.{name}"] = np.ones(1, np.float32)
    load_checkpoint(write_hf(tmp_path / "m", tensors))


# -- tokenizers and templates


def test_tokenizer_json_is_used_as_it_is(directory, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("two words\n2")) == "two words\n2"
    assert tokenizer.encode("ab", add_special_tokens=False) == load_tokenizer(directory).encode("ab")


def test_a_sentencepiece_model_alone_names_the_package(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x05\n\x03<s>")
    with pytest.raises(ValueError, match="needs the 'sentencepiece' package"):
        load_tokenizer(tmp_path)


def templated(directory, tmp_path, template) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return load_tokenizer(tmp_path)


def test_templates_take_variables_and_lists_of_content(directory, tmp_path):
    template = "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}!{% endif %}"
    tokenizer = templated(directory, tmp_path, template)
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": content}], enable_thinking=False)
    assert tokenizer.decode(ids) == "ab!"
    with pytest.raises(ValueError, match="content of type 'image'"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_named_templates_are_chosen_by_name(directory, tmp_path):
    named = [{"name": name, "template": name} for name in ("default", "tool_use")]
    tokenizer, messages = templated(directory, tmp_path, named), [{"role": "user", "content": "x"}]
    assert tokenizer.decode(tokenizer.apply_chat_template(messages)) == "default"
    assert tokenizer.decode(tokenizer.apply_chat_template(messages, tools=[{}])) == "tool_use"
    assert tokenizer.decode(tokenizer.apply_chat_template(messages, template="tool_use")) == "tool_use"
    with pytest.raises(ValueError, match="no chat template 'rag'; there are default, tool_use"):
        tokenizer.apply_chat_template(messages, template="rag")


def test_the_command_line_takes_template_variables_and_strict(directory, tmp_path, capsys):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = {"chat_template": "{{ messages[0].content }}{% if not enable_thinking %}!!!!{% endif %}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    arguments = ("generate", tmp_path, "x", "--max-new-tokens", 1, "--json", "--template-variable")
    counts = [
        json.loads(run(capsys, *arguments, f"enable_thinking={value}")[1])["prompt_tokens"]
        for value in ("true", "false")
    ]
    assert counts == [1, 5]
    status, _, news = run(capsys, "generate", tmp_path, "x" * 1024, "--raw", "--strict")
    assert status == 1 and "context of 1024" in news


def test_no_warning_where_nothing_is_wrong(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, [[5, 6]], max_new_tokens=1)
