"""A fact hidden in a real book, and a question about it: the smallest test of what sparse prefill must not lose.

Two facts that SmolLM2-135M-Instruct finds with dense attention at up to 4,096 tokens, so that a wrong answer points at
the attention: an address, and a seven-digit number. The answer is begun for the model with the fact's own words.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal, Protocol

_GAP = re.compile(r"(?<!Mr)(?<!Mrs)(?<!Dr)[.?!]\"?(?=\s)|(?=\n\n)")
_NAMES = ("Quimby Zorbeck", "Tarquin Oldacre", "Barnaby Fenwick", "Lucius Pettigrew", "Osbert Wimple", "Hubert Trask")
_TREES = ("Maple", "Cedar", "Willow", "Birch", "Chestnut", "Juniper", "Hawthorn", "Alder")
_WORDS = ("lantern", "harbor", "pepper", "violin", "meadow", "anchor", "walnut", "saddle")


class ChatTokenizer(Protocol):
    """What a needle needs of `minference_jax.text.tokenizer.Tokenizer`."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]: ...


@dataclass(frozen=True)
class Needle:
    """A hidden fact: `sentence` in the text, `question` about it, `prefix` of the reply, `answer` that must follow."""

    sentence: str
    question: str
    prefix: str
    answer: str


@dataclass(frozen=True)
class NeedlePrompt:
    """A needle in a haystack: `ids` to prefill, and the needle. `found` judges a reply (text after the prefix)."""

    ids: list[int]
    needle: Needle
    depth: float

    def found(self, reply: str) -> bool:
        """Whether the reply goes on with the answer."""
        return reply.strip().lower().startswith(self.needle.answer.lower())


def make_needle(kind: Literal["address", "magic"] = "address", *, seed: int = 0) -> Needle:
    """A needle whose name, number and words are drawn from `seed`. Raises `ValueError` for another kind."""
    draw = random.Random(f"{kind} {seed}")
    if kind == "address":
        name, answer = f"Mr. {draw.choice(_NAMES)}", f"{draw.randint(11, 99)} {draw.choice(_TREES)} Street"
        prefix = f"{name} lives at"
        return Needle(f"{prefix} {answer}.", f"Where does {name} live?", prefix, answer)
    if kind == "magic":
        word, answer = draw.choice(_WORDS), str(draw.randint(1_000_000, 9_999_999))
        prefix = f"One of the special magic numbers for {word} is:"
        question = f"What is the special magic number for {word} mentioned in the text?"
        return Needle(f"{prefix} {answer}.", question, prefix, answer)
    raise ValueError(f"kind must be 'address' or 'magic', got {kind!r}")


def needle_prompt(
    tokenizer: ChatTokenizer,
    text: str,
    *,
    tokens: int,
    depth: float = 0.5,
    seed: int = 0,
    kind: Literal["address", "magic"] = "address",
) -> NeedlePrompt:
    """A chat prompt of at most `tokens` tokens (and a few less): as much of `text` as fits, with a needle in it.

    **Arguments:**

    - `tokenizer`: the checkpoint's, with a chat template.
    - `text`: the haystack; paragraphs are taken from its start, and the needle goes between two sentences.
    - `depth`: where the needle lies, from 0 (start of the text) to 1 (its end).
    - `seed`: draws the needle.

    Raises `ValueError` when `depth` is outside [0, 1], the text is too short, or `tokens` leaves no room for any of it.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth}")
    needle = make_needle(kind, seed=seed)
    text_ids = tokenizer.encode(text, add_special_tokens=False)

    def build(size: int) -> list[int]:
        haystack = tokenizer.decode(text_ids[:size]).replace("\ufffd", "")  # the cut may be inside a character
        cut = _gap_between_sentences(haystack, round(depth * len(haystack)))
        body = f"{haystack[:cut]} {needle.sentence} {haystack[cut:].lstrip(' ')}"
        return tokenizer.apply_chat_template(
            [
                {"role": "user", "content": f"{body}\n\n{needle.question}"},
                {"role": "assistant", "content": needle.prefix},
            ],
            continue_final_message=True,
        )

    size = tokens - len(build(0))
    if size < 1 or size > len(text_ids):
        room = f"{len(text_ids):,} tokens of text and {len(build(0))} of question"
        raise ValueError(f"tokens={tokens:,} cannot be filled from {room}")
    ids = build(size)
    while len(ids) > tokens:  # merges across the seams differ by a token or two
        size -= len(ids) - tokens
        ids = build(size)
    return NeedlePrompt(ids, needle, depth)


def _gap_between_sentences(text: str, near: int) -> int:
    """The end of a sentence or paragraph, or of the text, that is nearest to a position."""
    return min((*(match.end() for match in _GAP.finditer(text)), len(text)), key=lambda end: abs(end - near))
