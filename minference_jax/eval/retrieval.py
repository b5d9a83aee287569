"""Retrieval from text without meaning: a pass key, a number with repeated digits, a value of a key in JSON.

Source: InfiniteBench (arXiv 2402.13718) §3 Retrieve.PassKey, Retrieve.Number, Retrieve.KV; the passages are drawn here
rather than read, and asked for by the words that precede the answer, which a model of any size can copy.
"""

from __future__ import annotations

import dataclasses
import json
import random
import uuid
from collections.abc import Sequence
from typing import Literal

from minference_jax.data.needle import ChatTokenizer
from minference_jax.eval.fill import fill_pieces
from minference_jax.eval.metrics import starts_with
from minference_jax.eval.samples import DEPTHS, Sample, draw, encode_prompt

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclasses.dataclass(frozen=True)
class HiddenNumber:
    """A pass key of five digits, or a sequence of ten digits with long repeats, among repeated sentences."""

    kind: Literal["passkey", "number"]
    depths: tuple[float, ...] = DEPTHS

    @property
    def name(self) -> str:
        """`passkey` or `number`."""
        return self.kind

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """As many repeats as fit in `length` tokens."""
        numbers = draw(self.name, length, index, seed)
        depth = self.depths[index % len(self.depths)]
        if self.kind == "passkey":
            answer = str(numbers.randint(10_000, 99_999))
            fact, opening = f"The pass key is {answer}. Remember it. {answer} is the pass key.", "The pass key is"
        else:
            answer = repeated_digits(numbers)
            fact = f"The sequence of digits is {answer}. Remember it. {answer} is the sequence of digits."
            opening = "The sequence of digits is"

        def build(repeats: int) -> list[int]:
            lines = [NOISE] * repeats
            lines.insert(round(depth * repeats), fact)
            return encode_prompt(tokenizer, "\n".join(lines) + f"\n\n{opening}")

        ids = fill_pieces(build, length, least=1, most=length)
        return Sample(self.name, length, index, tuple(ids), (answer,), 16, {"depth": depth})

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """1 where the digits follow."""
        return starts_with(reply, answers)


@dataclasses.dataclass(frozen=True)
class KeyValue:
    """The value of one key of a JSON object of UUIDs, the reply begun with the key."""

    name: str = "kv"
    max_new_tokens: int = 48
    depths: tuple[float, ...] = DEPTHS

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """As many pairs as fit in `length` tokens."""
        numbers = draw(self.name, length, index, seed)
        pairs = [(random_uuid(numbers), random_uuid(numbers)) for _ in range(max(2, length // 20))]
        depth = self.depths[index % len(self.depths)]

        def build(count: int) -> list[int]:
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs[:count]]
            lines.insert(round(depth * (count - 1)), lines.pop(0))
            return encode_prompt(tokenizer, "{" + ",\n".join(lines) + "}\n\n" + json.dumps(pairs[0][0]) + ': "')

        ids = fill_pieces(build, length, least=2, most=len(pairs))
        return Sample(self.name, length, index, tuple(ids), (pairs[0][1],), self.max_new_tokens, {"depth": depth})

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """1 where the whole value follows."""
        return starts_with(reply, answers)


def repeated_digits(numbers: random.Random, size: int = 10) -> str:
    """Digits of which some are repeated many times in a row, such as 6622222223."""
    digits = ""
    while len(digits) < size:
        digits += numbers.choice("0123456789") * numbers.randint(1, size - 2)
    return digits[:size]


def random_uuid(numbers: random.Random) -> str:
    """A UUID of the given random numbers."""
    return str(uuid.UUID(int=numbers.getrandbits(128), version=4))
