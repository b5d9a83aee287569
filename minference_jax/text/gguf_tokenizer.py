"""The tokenizer inside a GGUF file (tokenizer.ggml.*) as the files of a Hugging Face tokenizer.

GGUF stores vocabulary and merges, but names its pre-tokenizer only (`tokenizer.ggml.pre`), and that decides where text
is cut before merging. transformers' own GGUF import ignores the name, so digits come out wrong for SmolLM2; here an
unknown name is an error.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from minference_jax.checkpoints.gguf_config import ends_generation
from minference_jax.extras import naming_extra
from minference_jax.text.gguf_pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}  # sic: GGUF's key

# Phi-3's chat tokens swallow the white space after them. Its files do not say so; llama.cpp goes by the model's name.
_SWALLOWS_SPACE = re.compile("phi-?3", re.IGNORECASE)
_SWALLOWS_NOTHING = ("<unk>", "<s>", "<|endoftext|>")


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """A `tokenizers.Tokenizer` from a GGUF file's metadata.

    `tokenizer.ggml.model` may be "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE with scores). Raises
    `ValueError` for any other model or pre-tokenizer and for a vocabulary that is inconsistent; see `pre_tokenizer` for
    files that name none.
    """
    with naming_extra("a tokenizer"):
        from tokenizers import AddedToken, processors

    model = metadata.get("tokenizer.ggml.model")
    tokens = _tokens(metadata)
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"GGUF tokenizer {model!r} is not supported; supported: 'gpt2' (byte-level BPE), 'llama' (SPM)"
        )
    if not tokens:
        raise ValueError("tokenizer.ggml.tokens is missing or empty")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"tokenizer.ggml.tokens holds {len(tokens) - len(vocab)} repeated tokens")
    types = np.asarray(metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens), np.int32)))
    if types.shape != (len(tokens),):
        raise ValueError(f"tokenizer.ggml.token_type has {types.size} entries for {len(tokens)} tokens")

    tokenizer = (_byte_level_bpe if model == "gpt2" else _sentencepiece_bpe)(metadata, vocab)
    ends = [ends_generation(token) for token in tokens]  # control tokens, whatever the file says
    swallows = _swallows_space(metadata)

    def added(i: np.intp, special: bool) -> AddedToken:
        rstrip = swallows and tokens[i] not in _SWALLOWS_NOTHING
        return AddedToken(tokens[i], special=special, normalized=False, rstrip=rstrip)

    control = (types == _CONTROL) | np.array(ends) | (swallows & (types == _UNKNOWN))
    tokenizer.add_special_tokens([added(i, True) for i in np.flatnonzero(control)])
    tokenizer.add_tokens([added(i, False) for i in np.flatnonzero((types == _USER_DEFINED) & ~control)])

    names = special_tokens(metadata)
    rule = PRE_TOKENIZERS.get(metadata.get("tokenizer.ggml.pre", ""))
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or (rule is not None and rule.bos))
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
    tokens = _tokens(metadata)
    found = {}
    for name, key in _SPECIAL.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            if type(number) is not int or not 0 <= number < len(tokens):
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
    prefix = "tokenizer.chat_template"
    named = {key.removeprefix(f"{prefix}."): text for key, text in metadata.items() if key.startswith(f"{prefix}.")}
    if template := metadata.get(prefix):
        named = {"default": template, **named}
    if named:
        only = list(named) == ["default"]
        config["chat_template"] = template if only else [{"name": n, "template": text} for n, text in named.items()]
    return {key: value for key, value in config.items() if value is not None}


def tokenizer_files(metadata: dict[str, Any]) -> dict[str, str]:
    """File name → content of the Hugging Face tokenizer: tokenizer.json and tokenizer_config.json."""
    return {
        "tokenizer.json": build_tokenizer(metadata).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(tokenizer_config(metadata), indent=2, ensure_ascii=False) + "\n",
    }


def _tokens(metadata: dict[str, Any]) -> list[str]:
    """The vocabulary. An empty token gets a name, as in llama.cpp, since several may be."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    return [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)] if isinstance(tokens, list) else []


def _swallows_space(metadata: dict[str, Any]) -> bool:
    is_phi3 = metadata.get("general.architecture") == "phi3" and metadata.get("tokenizer.ggml.model") == "llama"
    return is_phi3 or _SWALLOWS_SPACE.search(str(metadata.get("general.name", ""))) is not None


def _byte_level_bpe(metadata: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    with naming_extra("a tokenizer"):
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = pre_tokenizer(metadata.get("tokenizer.ggml.pre"))
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    strange = [merge for merge in merges if len(merge) != 2 or any(p not in vocab for p in (*merge, "".join(merge)))]
    if strange or not merges:
        raise ValueError(f"tokenizer.ggml.merges is missing or holds {len(strange)} merges of unknown tokens")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=rule.whole_words))
    steps: list[Any] = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in rule.cuts]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    """SentencePiece joins the pair whose joined piece scores highest; as BPE, merges in the order of that score."""
    with naming_extra("a tokenizer"):
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
