"""A needle in a haystack: the two facts that small models find too, asked for in three ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from minference_jax.data.needle import ChatTokenizer, make_needle
from minference_jax.eval.fill import fill_text, insert_between_sentences
from minference_jax.eval.metrics import any_found, starts_with
from minference_jax.eval.samples import DEPTHS, Sample, draw, encode_prompt


@dataclasses.dataclass(frozen=True)
class NeedleTask:
    """A fact between two sentences of a book, at each of `depths` in turn, which are shares of the text.

    - `kind`: the fact, "magic" (a seven-digit number for a word) or "address".
    - `mode`: how it is asked for. "raw": the text ends with the fact's opening words, so that the model has to copy
      what followed them. "chat": a question in the chat template. "prefix": the same, with the reply begun for the
      model by the fact's opening words.
    - `text`: the haystack.
    """

    kind: Literal["magic", "address"]
    mode: Literal["raw", "chat", "prefix"]
    text: str
    max_new_tokens: int = 16
    depths: tuple[float, ...] = DEPTHS

    @property
    def name(self) -> str:
        """`needle-<kind>-<mode>`."""
        return f"needle-{self.kind}-{self.mode}"

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """A prompt of exactly `length` tokens."""
        numbers = draw(f"needle-{self.kind}", length, index, seed)  # the same facts for each mode
        needle = make_needle(self.kind, seed=numbers.getrandbits(32))
        depth = self.depths[index % len(self.depths)]
        chat = self.mode != "raw"
        reply = needle.prefix if self.mode == "prefix" else ""

        def build(haystack: str) -> list[int]:
            text = insert_between_sentences(haystack, [needle.sentence], [depth])
            ending = f"\n\n{needle.question}" if chat else f"\n\n{needle.prefix}"
            return encode_prompt(tokenizer, text + ending, reply, chat=chat)

        ids = fill_text(tokenizer, self.text, build, length, start=numbers.random())
        new = self.max_new_tokens if self.mode != "chat" else 3 * self.max_new_tokens
        return Sample(self.name, length, index, tuple(ids), (needle.answer,), new, {"depth": depth})

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """1 where the answer follows the given words, or occurs anywhere if none were given."""
        return (any_found if self.mode == "chat" else starts_with)(reply, answers)
