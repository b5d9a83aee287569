"""Rows of a user's own file as a task: a prompt by a template, the right answer in a field, a metric."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minference_jax.data.needle import ChatTokenizer
from minference_jax.eval import metrics
from minference_jax.eval.jsonl import truncate_middle
from minference_jax.eval.samples import Metric, Sample, encode_prompt
from minference_jax.jobs.prompt_template import PromptTemplate
from minference_jax.jobs.rows import read_rows

METRICS: dict[str, Metric] = {
    "exact": metrics.exact_match,
    "f1": metrics.token_f1,
    "rouge-l": metrics.rouge_l,
    "contains": metrics.any_found,
    "accuracy": lambda reply, answers: float(reply in answers),
}
"""Name → how a reply is judged by the right answers. Of "accuracy", the reply is the likeliest of some choices."""


@dataclasses.dataclass(frozen=True)
class OwnData:
    """Each row a prompt, in the order of the file.

    - `template`: the prompt, with the row's fields in braces.
    - `answers`, `choices`: of each row; no choices where the reply is written freely, with up to `max_new_tokens`.
    - `chat`: the prompt is a user's message of the chat template, not a text to go on with.
    """

    name: str
    rows: tuple[Mapping[str, Any], ...]
    template: PromptTemplate
    metric: str
    answers: tuple[tuple[str, ...], ...]
    choices: tuple[tuple[str, ...], ...] = ()
    max_new_tokens: int = 64
    chat: bool = True

    @property
    def distinct(self) -> int:
        """As many as there are rows."""
        return len(self.rows)

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """Row `index`. Where the prompt would be longer than `length`, its longest field loses its middle, and `about`
        says so. Raises `ValueError` naming the row where that is not enough."""
        row = index % len(self.rows)
        texts = {name: self.template.text_of(self.rows[row], name) for name in self.template.fields}
        longest = max(texts, key=lambda name: len(texts[name]))

        def build(text: str) -> list[int]:
            return encode_prompt(tokenizer, self.template.fill(texts | {longest: text}), chat=self.chat)

        try:
            ids = truncate_middle(tokenizer, texts[longest], build, length)
        except ValueError as error:
            raise ValueError(f"{self.name}, row {row}: {error}") from None
        about: dict[str, Any] = {"row": row}
        if ids != build(texts[longest]):
            about["cut"] = True
        choices = self.choices[row] if self.choices else ()
        if choices and not self.chat and not self.template.text[-1:].isspace():
            choices = tuple(f" {choice}" for choice in choices)  # as a text goes on
        new = 0 if choices else self.max_new_tokens
        return Sample(self.name, length, index, tuple(ids), self.answers[row], new, about, choices=choices)

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """By the metric."""
        return METRICS[self.metric](reply.strip(), answers)


def read_own_data(
    path: str | Path,
    template: str,
    answer: str,
    metric: str,
    *,
    choices: Sequence[str] = (),
    max_new_tokens: int = 64,
    chat: bool = True,
) -> OwnData:
    """A task of the rows of a JSONL, CSV or text file (`jobs.read_rows`), named after the file.

    **Arguments:**

    - `template`: such as `"{document}\\n\\nQuestion: {question}"`.
    - `answer`: the field with the right answer: a text or number, or a list of those that are right. With choices also
      the place of one, from 0.
    - `metric`: of `METRICS`. "accuracy" needs choices, the others write freely.
    - `choices`: two or more labels, the same for all rows; or one name, of the field that lists each row's own.

    Raises `ValueError` naming the file and the row where a field is missing or no answer is among the choices.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if bool(choices) != (metric == "accuracy"):
        raise ValueError(f"metric {metric}: accuracy, and nothing else, is over choices; got choices {list(choices)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    rows, wording = read_rows(path), PromptTemplate(template)
    wording.check(rows)
    listed = [_choices(path, number, row, choices) for number, row in enumerate(rows)]
    answers = [_answers(path, number, row, answer, listed[number]) for number, row in enumerate(rows)]
    own = tuple(listed) if choices else ()
    return OwnData(Path(path).stem, tuple(rows), wording, metric, tuple(answers), own, max_new_tokens, chat)


def _field(path: str | Path, number: int, row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(f"{path}, row {number} has no field {name!r}; its fields are {', '.join(row) or 'none'}")
    return row[name]


def _choices(path: str | Path, number: int, row: Mapping[str, Any], choices: Sequence[str]) -> tuple[str, ...]:
    if len(choices) != 1:
        return tuple(choices)
    found = _field(path, number, row, choices[0])
    labels = tuple(str(one).strip() for one in found) if isinstance(found, list) else ()
    if len(set(labels)) < max(len(labels), 2) or not all(labels):
        raise ValueError(f"{path}, row {number}: {choices[0]} must list two or more choices that differ, got {found!r}")
    return labels


def _answers(
    path: str | Path, number: int, row: Mapping[str, Any], name: str, choices: tuple[str, ...]
) -> tuple[str, ...]:
    found = _field(path, number, row, name)
    answers = found if isinstance(found, list) else [found]
    if not answers or any(isinstance(one, dict | list | bool) or one is None for one in answers):
        raise ValueError(f"{path}, row {number}: {name} must be a text, a number or a list of them, got {found!r}")
    texts = [str(one).strip() for one in answers]
    if not choices:
        return tuple(texts)
    places = dict(enumerate(choices))
    texts = [text if text in choices else places.get(int(text), text) if text.isdecimal() else text for text in texts]
    if wrong := [text for text in texts if text not in choices]:
        raise ValueError(f"{path}, row {number}: {name} {wrong[0]!r} is none of the choices {', '.join(choices)}")
    return tuple(texts)
