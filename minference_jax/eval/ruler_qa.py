"""RULER's question answering: a question's paragraph among paragraphs of other questions.

Source: RULER (arXiv 2404.06654) §3; the wording is ours. The questions come from a local file in SQuAD's format.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from minference_jax.data.needle import ChatTokenizer
from minference_jax.eval.fill import fill_pieces
from minference_jax.eval.metrics import any_found
from minference_jax.eval.samples import Sample, draw, encode_prompt

MAX_NEW_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its paragraphs' numbers, and the accepted answers."""

    text: str
    paragraphs: tuple[int, ...]
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RulerQuestions:
    """`qa_1` (one paragraph a question, as SQuAD's) or `qa_2` (questions that need several, as HotpotQA's)."""

    name: str
    paragraphs: tuple[str, ...]
    questions: tuple[Question, ...]

    @classmethod
    def read(cls, path: str | Path, name: str = "ruler-qa_1") -> RulerQuestions:
        """Reads SQuAD's JSON: {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text"}]}]}]}]}.

        Questions without an answer are left out. A question that is asked of several paragraphs needs all of them,
        which is how multi-paragraph sets such as HotpotQA are written in this format. Raises `ValueError` naming the
        file when it is something else.
        """
        contexts: dict[str, int] = {}
        asked: dict[str, tuple[list[int], list[str]]] = {}
        try:
            for article in json.loads(Path(path).read_text(encoding="utf-8"))["data"]:
                for paragraph in article["paragraphs"]:
                    place = contexts.setdefault(paragraph["context"], len(contexts))
                    for question in paragraph["qas"]:
                        answers = [answer["text"] for answer in question.get("answers") or ()]
                        if answers and not question.get("is_impossible"):
                            places, texts = asked.setdefault(question["question"], ([], []))
                            places.append(place)
                            texts.extend(answers)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not in SQuAD's format: {type(error).__name__} {error}") from None
        if not asked:
            raise ValueError(f"{path}: holds no question with an answer")
        if wrong := next((one for one in (*contexts, *asked) if not isinstance(one, str)), None):
            raise ValueError(f"{path}: not in SQuAD's format: {wrong!r} is no text")
        questions = (
            Question(text, tuple(dict.fromkeys(places)), tuple(dict.fromkeys(answers)))
            for text, (places, answers) in asked.items()
        )
        return cls(name, tuple(contexts), tuple(questions))

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """The question's paragraphs among as many others as fit in `length − 32` tokens, in random order."""
        numbers = draw(self.name, length, index, seed)
        question = self.questions[index % len(self.questions)]
        others = [i for i in range(len(self.paragraphs)) if i not in question.paragraphs]
        numbers.shuffle(others)
        places = [numbers.random() for _ in self.paragraphs]

        def build(count: int) -> list[int]:
            chosen = sorted((*question.paragraphs, *others[:count]), key=places.__getitem__)
            documents = "\n\n".join(f"Document {i}:\n{self.paragraphs[p]}" for i, p in enumerate(chosen, 1))
            return encode_prompt(
                tokenizer,
                "Answer the question from the given documents. Give only the answer, and no other words.\n\n"
                f"{documents}\n\nQuestion: {question.text}",
                " Answer:",
            )

        ids = fill_pieces(build, length - MAX_NEW_TOKENS, least=0, most=len(others))
        return Sample(self.name, length, index, tuple(ids), question.answers, MAX_NEW_TOKENS)

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """1 where any accepted answer occurs in the reply."""
        return any_found(reply, answers)
