"""Questions asked inside a prompt: several turns of a conversation about one text, in one prefill.

Rules that look at a prompt's last rows for what matters are blind to a question that was asked before. The answers are
part of the prompt, so what is measured is how likely the model finds them where they stand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from minference_jax.data.needle import ChatTokenizer
from minference_jax.eval.fill import text_ids
from minference_jax.eval.samples import Sample, draw

_OWNERS = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karla", "Louis")


@dataclasses.dataclass(frozen=True)
class Turns:
    """Pass keys hidden in the first half of a text; in the second half, questions about them with their answers.

    Fact i of n stands at the share i / 2n of the prompt. The questions come in an order of their own, evenly spread,
    and the last one ends the prompt.
    """

    text: str
    name: str = "turns"
    count: int = 8

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """Exactly `length` tokens; `scored` are those of the answers. Raises `ValueError` where they do not fit."""
        numbers = draw(self.name, length, index, seed)
        keys = [(owner, str(numbers.randint(10_000, 99_999))) for owner in numbers.sample(_OWNERS, self.count)]

        def ids(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        facts = [(ids(f"\n\nThe pass key of {owner} is {key}. Remember it."), []) for owner, key in keys]
        turns = [
            (ids(f"\n\nQuestion: What is the pass key of {owner}? Answer: The pass key of {owner} is"), ids(f" {key}"))
            for owner, key in numbers.sample(keys, self.count)
        ]
        pieces, gap, start = [*facts, *turns], ids("\n\n"), tokenizer.encode("")
        fixed = len(start) + (len(pieces) - 1) * len(gap) + sum(len(before) + len(answer) for before, answer in pieces)
        room = length - fixed
        text = text_ids(tokenizer, self.text)
        if room < 0 or not text:
            raise ValueError(f"length {length} is too short: facts and questions have {fixed} tokens")
        done, place = list(start), numbers.randrange(len(text))
        scored: list[int] = []
        for number, (before, answer) in enumerate(pieces):
            done += gap if number else []
            size = room * (number + 1) // len(pieces) - room * number // len(pieces)
            done += [text[(place + i) % len(text)] for i in range(size)]
            place += size
            done += before
            scored += range(len(done), len(done) + len(answer))
            done += answer
        about = {"turns": self.count}
        return Sample(self.name, length, index, tuple(done), scored=tuple(scored), about=about)

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """The answers are measured by likelihood, and no reply is judged."""
        raise TypeError("turns are measured by likelihood")
