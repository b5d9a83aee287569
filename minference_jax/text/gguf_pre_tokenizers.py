"""What a GGUF file's `tokenizer.ggml.pre` stands for: where text is cut before merging. One row a rule.

GGUF stores only a name. The rules are those of the models' own tokenizer.json files; the names that share a rule are
llama.cpp's (`llama-vocab.cpp`). Regular expressions of a row apply one after another, each to the pieces that the
one before left, and what none of them matches stays a piece.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"  # with what has no case
_OPEN = r"[^\r\n\p{L}\p{N}]?"
_ASCII_MARK_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"  # Han, Hiragana, Katakana


def _cased(ending: str, digits: str) -> str:
    """Words cut where lower case is followed by upper case; `ending` may follow a word."""
    words = f"{_OPEN}{_UPPER}*{_LOWER}+{ending}|{_OPEN}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"


def _words(digits: str, word: str = _WORD, marks: str = _MARKS) -> str:
    return f"{_SHORT}|{word}|{digits}|{marks}|{_SPACE}"


@dataclass(frozen=True)
class PreTokenizer:
    """A rule and its names.

    - `cuts`: the regular expressions, applied in order.
    - `whole_words`: a piece that is a token needs no merges. `bos`: a bos token is put first unless the file says no.
    - `nfc`: text is normalized to NFC first.
    """

    names: tuple[str, ...]
    cuts: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False


_DEFAULT = PreTokenizer(("default",), (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

_RULES = (
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        (_words(r"\p{N}{1,3}"),),
        whole_words=True,
        bos=True,
    ),
    PreTokenizer(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (_words(r"\p{N}{1,3}"),)),
    PreTokenizer(
        (
            *("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"),
            *("stablelm2", "hunyuan", "solar-open", "grok-2"),
        ),
        (_words(r"\p{N}"),),
        nfc=True,
    ),
    PreTokenizer(
        ("qwen35",),
        (_words(r"\p{N}", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),),
        nfc=True,
    ),
    PreTokenizer(("seed-coder",), (_words(r"\p{N}", marks=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    PreTokenizer(("minicpm5",), (r"\p{N}{1,3}", _words(r"\p{N}+")), whole_words=True),
    PreTokenizer(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        (rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+",),
    ),
    PreTokenizer(("tekken",), (_cased("", r"\p{N}"),), whole_words=True, bos=True),
    PreTokenizer(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), (_cased(f"{_SHORT}?", r"\p{N}{1,3}"),)),
    PreTokenizer(("tiny_aya", "cohere2moe"), (r"\d{1,3}(?=(?:\d{3})*\b)", _cased(f"{_SHORT}?", r"\p{N}{1,3}"))),
    PreTokenizer(
        ("deepseek-llm",),
        (
            *(r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\x{1D400}-\x{1D7FF}]]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            *(r"\s+$", "[一-龥ࠀ-一가-퟿]+", r"\p{N}+"),
        ),
    ),
    PreTokenizer(("deepseek-coder",), (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    PreTokenizer(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
        (
            *(r"\p{N}{1,3}", _CJK),
            _ASCII_MARK_WORD + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACE,
        ),
    ),
    PreTokenizer(
        (
            *("gpt-2", "gpt2", "phi-2", "mistral-bpe", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"),
            *("gigachat", "a.x-4.0", "mellum", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "modern-bert"),
        ),
        (_GPT2,),
    ),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (r"\p{N}", _GPT2),
    ),
    PreTokenizer(("falcon",), (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    PreTokenizer(("superbpe",), (r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    PreTokenizer(("poro-chat", "bloom", "gpt3-finnish"), (r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    PreTokenizer(("viking",), (r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")),
    _DEFAULT,
)
PRE_TOKENIZERS = {name: rule for rule in _RULES for name in rule.names}
"""Name → rule."""


def pre_tokenizer(name: str | None) -> PreTokenizer:
    """The rule of a name.

    Files of early 2024 have no name, or "default", whatever their model: they get llama.cpp's rule for them, with a
    `UserWarning`, since a model that learned another one reads its prompts cut in the wrong places. Raises `ValueError`
    for a name that is not in the table.
    """
    if name is None or name == "default":
        said = "names no pre-tokenizer" if name is None else "names the pre-tokenizer 'default'"
        warnings.warn(
            f"this GGUF file {said} (tokenizer.ggml.pre), so text may be cut elsewhere than the model learned; "
            "convert it again with a llama.cpp of May 2024 or later",
            UserWarning,
            stacklevel=2,
        )
        return _DEFAULT
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"GGUF pre-tokenizer {name!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[name]
