"""RULER's tasks beyond retrieval: variable tracking, and the most common of many words.

Source: RULER (arXiv 2404.06654) §3 and Appendix; the wording is ours.
"""

from __future__ import annotations

import dataclasses
import math
import random
import string
from collections.abc import Sequence
from functools import lru_cache

from minference_jax.data.needle import ChatTokenizer
from minference_jax.eval.fill import fill_pieces
from minference_jax.eval.metrics import all_found
from minference_jax.eval.retrieval import NOISE
from minference_jax.eval.samples import Sample, draw, encode_prompt
from minference_jax.eval.words import words_of


@dataclasses.dataclass(frozen=True)
class VariableTracking:
    """A chain of assignments among repeated sentences: which variables hold its value? One example comes first."""

    hops: int = 4
    name: str = "ruler-vt"
    max_new_tokens: int = 30

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """As many sentences as fit in `length − 30` tokens."""
        numbers = draw(self.name, length, index, seed)
        example = _chain(numbers, self.hops), str(numbers.randint(10_000, 99_999))
        names, value = _chain(numbers, self.hops), str(numbers.randint(10_000, 99_999))
        depths = sorted(numbers.random() for _ in names)

        def ask(names: list[str], value: str, depths: list[float], repeats: int) -> str:
            lines = [NOISE] * repeats
            for line, depth in reversed(list(zip(_assignments(names, value), depths, strict=True))):
                lines.insert(round(depth * repeats), line)
            return (
                "Remember and follow the chain of variable assignments in the following text.\n\n"
                + "\n".join(lines)
                + f"\nQuestion: Which variables are assigned the value {value} in the text above? "
                f"Answer: The {len(names)} variables that are assigned the value {value} in the text above are:"
            )

        shot = ask(*example, [i / len(names) for i in range(len(names))], 2) + " " + " ".join(example[0]) + "\n\n"

        def build(repeats: int) -> list[int]:
            return encode_prompt(tokenizer, shot + ask(names, value, depths, repeats))

        ids = fill_pieces(build, length - self.max_new_tokens, least=1, most=length)
        return Sample(self.name, length, index, tuple(ids), tuple(names), self.max_new_tokens)

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """Share of the chain's variables found in the reply."""
        return all_found(reply, answers)


@dataclasses.dataclass(frozen=True)
class CommonWords:
    """A numbered list of words: ten of them come 30 times, all others 3 times. Which are the ten?

    One small example comes first. Where the ten would take most of the length, they come less often.
    """

    text: str
    common: int = 10
    name: str = "ruler-cwe"
    max_new_tokens: int = 120

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """As many words as fit in `length − 120` tokens."""
        numbers, room = draw(self.name, length, index, seed), length - self.max_new_tokens
        words = list(words_of(self.text))
        if len(words) < 20 + self.common:
            raise ValueError(f"ruler-cwe needs a text of more words: {len(words)} different ones are too few")
        numbers.shuffle(words)
        shown, top, rest = words[:14], words[14 : 14 + self.common], words[14 + self.common :]
        often, rarely = next((pair for pair in ((30, 3), (20, 2)) if 8 * self.common * pair[0] < 0.65 * room), (10, 1))

        def ask(words: list[str]) -> str:
            listed = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
            return (
                "Below is a numbered list of words. Some of them occur more often than the others. Remember those.\n"
                f"{listed}\nQuestion: What are the {self.common} most common words in the list above? "
                f"Answer: The {self.common} most common words in the list are:"
            )

        example = _shuffled(numbers, shown[:10] * 3 + shown[10:])
        shot = ask(example) + " " + " ".join(f"{i}. {word}" for i, word in enumerate(shown[:10], 1)) + "\n\n"
        places = numbers.getrandbits(32)

        def build(others: int) -> list[int]:
            listed = top * often + rest[:others] * rarely
            return encode_prompt(tokenizer, shot + ask(_shuffled(random.Random(places), listed)))

        ids = fill_pieces(build, room, least=1, most=len(rest))
        return Sample(self.name, length, index, tuple(ids), tuple(top), self.max_new_tokens)

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """Share of the common words found in the reply."""
        return all_found(reply, answers)


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """Coded words whose frequencies fall with the square of their rank; rank one is dots. Which are the next three?"""

    alpha: float = 2.0
    name: str = "ruler-fwe"
    max_new_tokens: int = 50

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """As many words as fit in `length − 50` tokens, of length / 50 different ones."""
        numbers = draw(self.name, length, index, seed)
        vocabulary = ["..."]
        while len(vocabulary) < max(8, length // 50):
            word = "".join(numbers.choices(string.ascii_lowercase, k=6))
            if word not in vocabulary:
                vocabulary.append(word)
        places = numbers.getrandbits(32)

        def build(count: int) -> list[int]:
            shares = zeta_counts(count, len(vocabulary), self.alpha)
            words = [word for word, times in zip(vocabulary, shares, strict=True) for _ in range(times)]
            text = " ".join(_shuffled(random.Random(places), words))
            return encode_prompt(
                tokenizer,
                "Read the following coded text and count how often each coded word occurs. Ignore the dots '....'\n"
                f"{text}\nQuestion: What are the three most frequent words in the coded text above? "
                "Answer: The three most frequent words in the coded text are:",
            )

        ids = fill_pieces(build, length - self.max_new_tokens, least=24, most=length)
        return Sample(self.name, length, index, tuple(ids), tuple(vocabulary[1:4]), self.max_new_tokens)

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """Share of the three words found in the reply."""
        return all_found(reply, answers)


def zeta_counts(count: int, ranks: int, alpha: float) -> list[int]:
    """How often the word of each rank occurs among about `count` words: count / (ζ(α) · rank^α), rounded down."""
    return [int(count / _zeta(alpha) * rank**-alpha) for rank in range(1, ranks + 1)]


@lru_cache(maxsize=8)
def _zeta(alpha: float) -> float:
    terms = 10_000  # and the integral of the rest
    return math.fsum(k**-alpha for k in range(1, terms)) + (terms - 0.5) ** (1 - alpha) / (alpha - 1)


def _chain(numbers: random.Random, hops: int) -> list[str]:
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(numbers.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    return names


def _assignments(names: list[str], value: str) -> list[str]:
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    return [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=True)]


def _shuffled(numbers: random.Random, items: list[str]) -> list[str]:
    items = list(items)
    numbers.shuffle(items)
    return items
