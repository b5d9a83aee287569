"""What a task gives the runner: token ids, the answers to look for, and how a reply is judged."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from minference_jax.data.needle import ChatTokenizer

Metric = Callable[[str, Sequence[str]], float]
"""Score of a reply in [0, 1], given the answers."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt.

    - `task`, `length`, `index`: which; together they name it (`id`).
    - `tokens`: the prompt's ids, at most `length`.
    - `answers`: what the task's metric looks for in the reply. Empty for text whose likelihood is measured.
    - `max_new_tokens`: of the reply; 0 for text whose likelihood is measured.
    - `about`: what a report may group by, such as the needle's depth. JSON values.
    - `scored`: positions of the tokens whose likelihood is measured, from 1 on; empty for all but the first one.
    - `choices`: where there are any, the reply is the likeliest of them.
    """

    task: str
    length: int
    index: int
    tokens: tuple[int, ...]
    answers: tuple[str, ...] = ()
    max_new_tokens: int = 0
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scored: tuple[int, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """`task/length/index`: the same for every method, and for a run that goes on where another ended."""
        return f"{self.task}/{self.length}/{self.index}"


MAX_LENGTH = 1 << 22
"""Longest prompt, in tokens: four times the longest that any model here reads. More is a slip of the keyboard."""


def check_length(length: int) -> None:
    """Raises `ValueError` for a prompt length out of range."""
    if not 0 < length <= MAX_LENGTH:
        raise ValueError(f"lengths must be from 1 to {MAX_LENGTH:,} tokens, got {length}")


DEPTHS = tuple(step / 100 for step in (5, 95, 45, 75, 25, 55, 85, 15, 65, 35))
"""Where needles lie, as shares of the text, in the order of the samples: a few of them cover all of it too."""


class Task(Protocol):
    """A family of prompts of any length, each drawn from a seed and an index alone.

    One that has no more than some number of different prompts says so in an attribute `distinct`.
    """

    @property
    def name(self) -> str:
        """In results and on the command line."""
        ...

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """Prompt `index` of at most `length` tokens. Raises `ValueError` where it cannot be made that short."""
        ...

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """Of a reply, in [0, 1]."""
        ...


def available(task: Task, samples: int) -> int:
    """How many samples of a task there are, up to `samples`: the rows of a file are not run twice."""
    return min(samples, getattr(task, "distinct", samples))


def draw(task: str, length: int, index: int, seed: int) -> random.Random:
    """The random numbers of one sample, which no other sample's depend on."""
    return random.Random(f"{seed} {task} {length} {index}")


def encode_prompt(tokenizer: ChatTokenizer, text: str, reply: str = "", *, chat: bool = False) -> list[int]:
    """Ids of `text` with the beginning of its reply: as one text, or by the checkpoint's chat template."""
    if not chat:
        return tokenizer.encode(text + reply)
    messages = [{"role": "user", "content": text}]
    if not reply:
        return tokenizer.apply_chat_template(messages)
    return tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": reply}], continue_final_message=True
    )
