"""Tokenizers: exact round trips, GGUF's pre-tokenizers, chat prompts, and text that streams."""

import json

import gguf
import numpy as np
import pytest
from checkpoints import CONFIG, random_tensors
from smollm2 import smollm2_directory
from test_gguf import gguf_tensors, write_gguf

from minference_jax.checkpoints.convert import save_checkpoint
from minference_jax.text.gguf_tokenizer import build_tokenizer, tokenizer_files
from minference_jax.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

TRICKY = [
    "",
    " ",
    "plain words, one after another.",
    "1234567 and 3.14159, 2,048 tokens; x1y22z333",
    "   7 days \t 8\n\n  9",
    "def f(x):\n    return x ** 2  # squared\n\n\n",
    "Grüße, 日本語のテキスト, العربية, हिन्दी",
    "😀👩\u200d👩\u200d👧 e\u0301 \u00a0 \u2003 ½ ٣ Ⅷ",
    "<|im_start|>user\nhi<|im_end|>\n",
    "\x00\x01\x7f \r\n",
]


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(smollm2_directory())


@pytest.mark.parametrize("text", TRICKY)
def test_round_trips_are_exact(smollm2, text):
    ids = smollm2.encode(text)
    assert smollm2.decode(ids) == text
    decoder = smollm2.stream(skip_special_tokens=False)
    pieces = [decoder.push(i) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + decoder.end() == text


def test_smollm2_splits_every_digit(smollm2):
    """Its pre-tokenizer cuts digits off first, spaces before them included: transformers' GGUF import does not."""
    pieces = [smollm2.decode([i]) for i in smollm2.encode("in 1815,  42")]
    assert pieces == ["in", " ", "1", "8", "1", "5", ",", "  ", "4", "2"]


def test_smollm2_chat_prompt(smollm2):
    messages = [{"role": "user", "content": "Hi 5"}]
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    prompt = system + "<|im_start|>user\nHi 5<|im_end|>\n<|im_start|>assistant\n"
    ids = smollm2.apply_chat_template(messages)
    assert smollm2.decode(ids) == prompt
    assert ids.count(1) == 3  # <|im_start|> is one token
    assert smollm2.decode(ids, skip_special_tokens=True).startswith("system\nYou are")
    begun = [*messages, {"role": "assistant", "content": "It is"}]
    assert smollm2.decode(smollm2.apply_chat_template(begun, continue_final_message=True)) == prompt + "It is"
    closed = smollm2.apply_chat_template(begun, add_generation_prompt=False)
    assert smollm2.decode(closed) == prompt + "It is<|im_end|>\n"
    # <|im_end|>; a model that was fetched lately also ends with <|endoftext|> and <reponame>, as with llama.cpp.
    assert smollm2.eos_token_ids in ((2, 0, 4), (2,))
    assert smollm2.pad_token_id == 2
    assert smollm2.vocab_size == 49152


def byte_characters():
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def bpe_metadata(pre, merges=(), **changes):
    """A byte-level vocabulary with a few merges, and two control tokens at the end."""
    tokens = [*byte_characters().values(), *("".join(merge.split(" ")) for merge in merges), "<s>", "</s>"]
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * (len(tokens) - 2) + [3, 3], "int32"),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | changes


MERGES = ("1 2", "12 3", "123 4", "Ġ Ġ", "Ġ 1", "a b", "Ġ ab")


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab  1234", ["ab", "Ġ", "Ġ", "1234"]),  # the last space stays with the number
        ("tekken", "ab  1234", ["<s>", "ab", "Ġ", "Ġ", "1", "2", "3", "4"]),
        ("gpt-4o", "abAb 1234", ["ab", "A", "b", "Ġ", "123", "4"]),
        ("deepseek-llm", "ab  1234", ["ab", "ĠĠ", "1234"]),
        ("falcon", "ab  1234", ["ab", "Ġ", "Ġ", "123", "4"]),
        ("smollm", "ab  1234", ["ab", "ĠĠ", "1", "2", "3", "4"]),
        ("qwen2", "ab  1234", ["ab", "Ġ", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", "ab  1234", ["<s>", "ab", "Ġ", "Ġ", "123", "4"]),  # digits in threes, bos first
        ("qwen2", "ab ab\n", ["ab", "Ġab", "Ċ"]),
    ],
)
def test_pre_tokenizers_cut_where_they_should(pre, text, pieces):
    tokenizer = build_tokenizer(bpe_metadata(pre, MERGES))
    encoding = tokenizer.encode(text)
    assert encoding.tokens == pieces
    assert tokenizer.decode(encoding.ids, skip_special_tokens=True) == text


def test_bos_is_added_as_the_file_says():
    plain = bpe_metadata("smollm", MERGES)
    bos, eos = plain["tokenizer.ggml.bos_token_id"], plain["tokenizer.ggml.eos_token_id"]
    both = plain | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    inner = build_tokenizer(plain).encode("ab").ids
    assert build_tokenizer(both).encode("ab").ids == [bos, *inner, eos]
    no_bos = bpe_metadata("llama-bpe", MERGES) | {"tokenizer.ggml.add_bos_token": False}
    assert build_tokenizer(no_bos).encode("ab").ids == inner


def sentencepiece_metadata(best="bc"):
    """Three letters, the pairs `ab` and `bc` of which `best` scores higher, and every byte as fallback."""
    pieces = {"▁": -100.0, "a": -100.0, "b": -100.0, "c": -100.0, "ab": -2.0, "bc": -2.0, "▁a": -3.0} | {best: -1.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + list(pieces.values()), "float32"),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces), "int32"),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.parametrize(("best", "pieces"), [("bc", ["▁a", "bc"]), ("ab", ["▁", "ab", "c"])])
def test_sentencepiece_joins_the_pair_of_the_best_score_first(best, pieces):
    assert build_tokenizer(sentencepiece_metadata(best)).encode("abc").tokens == ["<s>", *pieces]


def test_sentencepiece_falls_back_to_bytes_and_strips_its_space():
    tokenizer = build_tokenizer(sentencepiece_metadata())
    encoding = tokenizer.encode("é abc")
    assert encoding.tokens == ["<s>", "▁", "<0xC3>", "<0xA9>", "▁a", "bc"]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=True) == "é abc"


BROKEN = {
    "other model": ({"tokenizer.ggml.model": "bert"}, "GGUF tokenizer 'bert' is not supported"),
    "no model": ({"tokenizer.ggml.model": None}, "GGUF tokenizer None is not supported"),
    "no tokens": ({"tokenizer.ggml.tokens": []}, "tokens is missing or empty"),
    "repeated tokens": ({"tokenizer.ggml.tokens": ["a", "a", "b"]}, "holds 1 repeated tokens"),
    "other pre-tokenizer": ({"tokenizer.ggml.pre": "elvish"}, "'elvish' is not supported; supported: llama-bpe"),
    "types are short": ({"tokenizer.ggml.token_type": np.ones(3, "int32")}, "token_type has 3 entries for 265 tokens"),
    "unknown merge": ({"tokenizer.ggml.merges": ["a b", "zz a"]}, "holds 1 merges of unknown tokens"),
    "merge of one": ({"tokenizer.ggml.merges": ["ab"]}, "holds 1 merges of unknown tokens"),
    "merge makes no token": ({"tokenizer.ggml.merges": ["b a"]}, "holds 1 merges of unknown tokens"),
    "no merges": ({"tokenizer.ggml.merges": []}, "merges is missing"),
    "eos out of range": ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id is 999, but there are 265 tokens"),
    "no scores": ({"tokenizer.ggml.model": "llama"}, "scores has 0 entries for 265 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_metadata(case):
    changes, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        tokenizer_files(bpe_metadata("gpt-2", MERGES, **changes))


def write_gguf_with_tokenizer(path):
    metadata = bpe_metadata("smollm", MERGES)
    tokens = metadata["tokenizer.ggml.tokens"]
    config = CONFIG | {"vocab_size": len(tokens)}
    extra = [
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", "smollm"),
        ("add_token_list", tokens),
        ("add_token_types", metadata["tokenizer.ggml.token_type"].tolist()),
        ("add_token_merges", list(MERGES)),
        ("add_chat_template", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"),
    ]
    return write_gguf(path, gguf_tensors(random_tensors(config), config), config, extra), config


def test_gguf_and_its_conversion_have_the_same_tokenizer(tmp_path):
    path, config = write_gguf_with_tokenizer(tmp_path / "model.gguf")
    from minference_jax.checkpoints.convert import load_checkpoint

    save_checkpoint(*load_checkpoint(path), tmp_path / "hf", tokenizer_from=path)
    save_checkpoint(*load_checkpoint(path), tmp_path / "copy", tokenizer_from=tmp_path / "hf")
    from_gguf, from_hf, from_copy = (load_tokenizer(tmp_path / name) for name in ("model.gguf", "hf", "copy"))
    messages = [{"role": "user", "content": "ab 12"}]
    for tokenizer in (from_gguf, from_hf, from_copy):
        for text in TRICKY:
            assert tokenizer.encode(text) == from_gguf.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.apply_chat_template(messages)) == "user: ab 12\n"
        assert tokenizer.eos_token_ids == (2, config["vocab_size"] - 1)  # "</s>" is known by its text


def test_chat_template_errors(tmp_path):
    save = tmp_path / "model"
    save.mkdir()
    for name, content in tokenizer_files(bpe_metadata("gpt-2", MERGES)).items():
        (save / name).write_text(content)
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(save).apply_chat_template([{"role": "user", "content": "hi"}])
    settings = json.loads((save / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('only users may speak') }}"
    (save / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="refuses these messages: only users may speak"):
        load_tokenizer(save).apply_chat_template([{"role": "user", "content": "hi"}])
    settings["chat_template"] = "{{ messages.__class__.__base__.__subclasses__() }}"  # the usual way out of a template
    (save / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="refuses these messages"):
        load_tokenizer(save).apply_chat_template([{"role": "user", "content": "hi"}])


def test_paths_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"broken\.gguf: not a GGUF file: only 4 bytes"):
        load_tokenizer(tmp_path / "broken.gguf")


class ByteTokenizer(Tokenizer):
    """Every byte is a token."""

    def __init__(self):
        pass

    def decode(self, ids, *, skip_special_tokens=False):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", [*TRICKY, "long " * 50 + "é" * 50 + "😀" * 50, "a real \ufffd stays \ufffd\ufffd b"])
def test_streaming_never_shows_half_a_character(text):
    decoder = StreamDecoder(ByteTokenizer())
    seen = ""
    for byte in text.encode():
        seen += decoder.push(byte)
        assert text.startswith(seen)
    assert seen + decoder.end() == text


def test_streaming_shows_bytes_that_never_become_a_character():
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(b) for b in b"a\xe2\x82b"] == ["a", "", "", "\ufffdb"]
    assert decoder.push(0xE2) == ""
    assert decoder.end() == "\ufffd"
    assert decoder.push(ord("c")) == "c"  # ready for the next text


def test_metadata_of_the_gguf_writer_reaches_the_tokenizer(tmp_path):
    path, config = write_gguf_with_tokenizer(tmp_path / "model.gguf")
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert load_tokenizer(path).vocab_size == config["vocab_size"]
