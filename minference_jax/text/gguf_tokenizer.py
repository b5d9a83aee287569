"""The tokenizer inside a GGUF file (tokenizer.ggml.*) as the files of a Hugging Face tokenizer.

GGUF stores vocabulary and merges, but names its pre-tokenizer only (`tokenizer.ggml.pre`), and that decides where text
is cut before merging. transformers' own GGUF import ignores the name, so digits come out wrong for SmolLM2; here an
unknown name is an error.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}  # sic: GGUF's key

# What `tokenizer.ggml.pre` stands for: the splitting regex; None is GPT-2's, which ByteLevel has built in.
_GPT2 = None
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REGEX = {
    **dict.fromkeys(("gpt-2", "gpt2", "default", "smollm", "mistral-bpe"), _GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LETTERS + r"\p{N}{1,3}" + _REST),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _LETTERS + r"\p{N}" + _REST),
}
_SINGLE_DIGITS = ("smollm",)  # every digit is cut off first
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # whole words of the vocabulary need no merges; a bos token is put first
_NFC = ("qwen2", "deepseek-r1-qwen")


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """A `tokenizers.Tokenizer` from a GGUF file's metadata.

    `tokenizer.ggml.model` may be "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE with scores). A file without
    `tokenizer.ggml.pre` is read as GPT-2's, as llama.cpp does. Raises `ValueError` for any other model or pre-tokenizer
    and for a vocabulary that is inconsistent.
    """
    from tokenizers import AddedToken, processors

    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"GGUF tokenizer {model!r} is not supported; supported: 'gpt2' (byte-level BPE), 'llama' (SPM)"
        )
    if not isinstance(tokens, list) or not tokens:
        raise ValueError("tokenizer.ggml.tokens is missing or empty")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"tokenizer.ggml.tokens holds {len(tokens) - len(vocab)} repeated tokens")
    types = np.asarray(metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens), np.int32)))
    if types.shape != (len(tokens),):
        raise ValueError(f"tokenizer.ggml.token_type has {types.size} entries for {len(tokens)} tokens")

    tokenizer = (_byte_level_bpe if model == "gpt2" else _sentencepiece_bpe)(metadata, vocab)
    tokenizer.add_special_tokens(
        [AddedToken(tokens[i], special=True, normalized=False) for i in np.flatnonzero(types == _CONTROL)]
    )
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False) for i in np.flatnonzero(types == _USER_DEFINED)])

    names = special_tokens(metadata)
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or _pre(metadata) in _LLAMA3)
    before = [names["bos_token"]] if adds_bos and "bos_token" in names else []
    after = [names["eos_token"]] if metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in names else []
    if before or after:
        template = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, vocab[token]) for token in before + after],
        )
        byte_level = [processors.ByteLevel(trim_offsets=False)] if model == "gpt2" else []
        tokenizer.post_processor = processors.Sequence([*byte_level, template])
    return tokenizer


def special_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """ "bos_token", "eos_token", "unk_token", "pad_token", "sep_token" → text, as far as the file names them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    found = {}
    for name, key in _SPECIAL.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            if not 0 <= number < len(tokens):
                raise ValueError(f"tokenizer.ggml.{key}_token_id is {number}, but there are {len(tokens)} tokens")
            found[f"{name}_token"] = tokens[number]
    return found


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer_config.json that goes with `build_tokenizer`: special tokens and chat template."""
    architecture = metadata.get("general.architecture")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata.get(f"{architecture}.context_length"),
        "clean_up_tokenization_spaces": False,
        **special_tokens(metadata),
    }
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return {key: value for key, value in config.items() if value is not None}


def tokenizer_files(metadata: dict[str, Any]) -> dict[str, str]:
    """File name → content of the Hugging Face tokenizer: tokenizer.json and tokenizer_config.json."""
    return {
        "tokenizer.json": build_tokenizer(metadata).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(tokenizer_config(metadata), indent=2, ensure_ascii=False) + "\n",
    }


def _pre(metadata: dict[str, Any]) -> str:
    return metadata.get("tokenizer.ggml.pre", "default")


def _byte_level_bpe(metadata: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _pre(metadata)
    if pre not in _REGEX:
        raise ValueError(f"GGUF pre-tokenizer {pre!r} is not supported; supported: {', '.join(_REGEX)}")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    strange = [merge for merge in merges if len(merge) != 2 or any(p not in vocab for p in (*merge, "".join(merge)))]
    if strange or not merges:
        raise ValueError(f"tokenizer.ggml.merges is missing or holds {len(strange)} merges of unknown tokens")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _LLAMA3))
    regex = _REGEX[pre]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre in _SINGLE_DIGITS else []
    if regex is not None:
        steps.append(pre_tokenizers.Split(Regex(regex), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    """SentencePiece joins the pair whose joined piece scores highest; as BPE, merges in the order of that score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = np.asarray(metadata.get("tokenizer.ggml.scores", ()), np.float64)
    if scores.shape != (len(vocab),):
        raise ValueError(f"tokenizer.ggml.scores has {scores.size} entries for {len(vocab)} tokens")
    tokens = list(vocab)
    merges = [
        (piece[:cut], piece[cut:])
        for piece in (tokens[i] for i in np.argsort(-scores, kind="stable"))
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    unknown = special_tokens(metadata).get("unk_token")
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
