"""RULER's eight needle tasks: which keys, values and haystacks, and how many of each, is all that they differ in.

Source: RULER (arXiv 2404.06654) §3 and Appendix; the wording is ours.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Literal

from minference_jax.data.needle import ChatTokenizer
from minference_jax.eval.fill import fill_pieces, fill_text, insert_between_sentences
from minference_jax.eval.metrics import all_found
from minference_jax.eval.retrieval import NOISE, random_uuid
from minference_jax.eval.samples import Sample, draw, encode_prompt
from minference_jax.eval.words import random_key

MAX_NEW_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class NeedleKind:
    """One of the eight: `keys` needles are hidden, with `values` values each, and `queries` of the keys asked for."""

    haystack: Literal["noise", "book", "needles"] = "book"
    key: Literal["words", "uuid"] = "words"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1


KINDS = {
    "niah_single_1": NeedleKind("noise"),
    "niah_single_2": NeedleKind(),
    "niah_single_3": NeedleKind(value="uuid"),
    "niah_multikey_1": NeedleKind(keys=4),
    "niah_multikey_2": NeedleKind("needles"),
    "niah_multikey_3": NeedleKind("needles", key="uuid", value="uuid"),
    "niah_multivalue": NeedleKind(values=4),
    "niah_multiquery": NeedleKind(keys=4, queries=4),
}


@dataclasses.dataclass(frozen=True)
class RulerNeedle:
    """A RULER needle task; `text` is the book for those that hide their needles in one."""

    variant: str
    text: str

    @property
    def name(self) -> str:
        """`ruler-<variant>`."""
        return f"ruler-{self.variant}"

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """A prompt that leaves room for the reply: at most `length − 128` tokens (128 of 1,024: 896)."""
        kind, numbers = KINDS[self.variant], draw(self.name, length, index, seed)
        facts: dict[str, list[str]] = {}
        while len(facts) < kind.keys:  # a key drawn twice is one key
            key = _draw(kind.key, numbers)
            facts[key] = [_draw(kind.value, numbers) for _ in range(kind.values)]
        needles = [_sentence(key, value, kind.value) for key, values in facts.items() for value in values]
        numbers.shuffle(needles)
        asked = numbers.sample(sorted(facts), kind.queries)
        grid = [i / 40 for i in range(1, 40)]
        depths = sorted(numbers.sample(grid, len(needles)))
        what = "number" if kind.value == "number" else "uuid"
        names = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        several = len(asked) * kind.values > 1
        special, verb = (f"special magic {what}s", "are") if several else (f"special magic {what}", "is")
        opening = f"Some magic {what}s are hidden in the following text. Remember them: you will be asked for them.\n"
        question = f"\nWhat {verb} {'all ' if several else ''}the {special} for {names} in the text?"
        reply = f" The {special} for {names} in the text {verb}"

        def ask(context: str) -> list[int]:
            return encode_prompt(tokenizer, opening + context + question + reply)

        room = length - MAX_NEW_TOKENS
        if kind.haystack == "book":
            build = lambda book: ask(insert_between_sentences(book, needles, depths))  # noqa: E731
            ids = fill_text(tokenizer, self.text, build, room, start=numbers.random())
        else:
            others = [NOISE] if kind.haystack == "noise" else _other_needles(kind, facts, numbers, room)

            def lines(count: int) -> list[int]:
                hay = [others[i % len(others)] for i in range(count)]
                for needle, depth in zip(reversed(needles), reversed(depths), strict=True):
                    hay.insert(round(depth * count), needle)
                return ask("\n".join(hay))

            ids = fill_pieces(lines, room, least=1, most=room)
        answers = tuple(value for key in asked for value in facts[key])
        about = {"depth": depths[0]} if len(depths) == 1 else {}
        return Sample(self.name, length, index, tuple(ids), answers, MAX_NEW_TOKENS, about)

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """Share of the values found in the reply."""
        return all_found(reply, answers)


def _draw(what: str, numbers: random.Random) -> str:
    if what == "words":
        return random_key(numbers)
    return random_uuid(numbers) if what == "uuid" else str(numbers.randint(1_000_000, 9_999_999))


def _sentence(key: str, value: str, what: str) -> str:
    return f"One of the special magic {what}s for {key} is: {value}."


def _other_needles(kind: NeedleKind, facts: dict[str, list[str]], numbers: random.Random, room: int) -> list[str]:
    """A haystack of needles about other keys, more of them than fit."""
    found: dict[str, str] = {}
    while len(found) < max(1, room // 12):
        key = _draw(kind.key, numbers)
        if key not in facts and (key not in found or kind.key == "words"):
            found[key + (f"-{len(found)}" if key in found else "")] = _draw(kind.value, numbers)
    return [_sentence(key, value, kind.value) for key, value in found.items()]
