"""Perplexity of a text: how likely a model finds the next token, averaged over a window of the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from minference_jax.data.needle import ChatTokenizer
from minference_jax.eval.fill import text_ids
from minference_jax.eval.samples import Sample


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Windows of exactly `length` tokens, evenly spread over `text` and as far apart as `windows` of them allow."""

    text: str
    name: str = "ppl"
    windows: int = 50

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """Window `index`; raises `ValueError` where the text is shorter than `length` tokens."""
        if length < 2:
            raise ValueError(f"length {length} is too short: one token has no likelihood")
        ids = text_ids(tokenizer, self.text)
        if len(ids) < length:
            raise ValueError(f"length {length} is too long: the text has {len(ids)} tokens")
        first = (len(ids) - length) * (index % self.windows) // max(self.windows - 1, 1)
        return Sample(self.name, length, index, tuple(ids[first : first + length]))

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """Perplexity judges no reply."""
        raise TypeError("perplexity is measured by likelihood")
