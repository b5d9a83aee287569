"""InfiniteBench and LongBench from local JSONL files: their fields, truncation and metrics.

Sources: InfiniteBench (arXiv 2402.13718), LongBench (arXiv 2308.14508). The prompts' wording is ours and most end with
the reply's beginning, so that a choice is the first letter; Chinese text is split into characters, not words; ROUGE-L
does not look at sentences. So scores compare methods with each other, not with published tables.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minference_jax.data.needle import ChatTokenizer
from minference_jax.eval import metrics
from minference_jax.eval.benchmark_files import infinitebench_task
from minference_jax.eval.samples import Metric, Sample, encode_prompt

INFINITEBENCH: dict[str, tuple[Metric, int, str]] = {
    "passkey": (metrics.first_number, 15, "{context}\n\n{input}\n\nThe pass key is"),
    "number_string": (metrics.first_number, 20, "{context}\n\n{input}\n\nThe sequence of digits is"),
    "kv_retrieval": (metrics.any_found, 80, "{context}\n\n{input}"),
    "longbook_sum_eng": (metrics.rouge_l, 1200, "{context}\n\nSummarize the book above.\n\nSummary:"),
    "longbook_qa_eng": (metrics.token_f1, 40, "{context}\n\nQuestion: {input}\nAnswer in a few words:"),
    "longbook_qa_chn": (metrics.token_f1, 40, "{context}\n\n问题：{input}\n简短回答："),
    "longbook_choice_eng": (
        metrics.first_letter,
        40,
        "{context}\n\nQuestion: {input}\n{options}\nThe letter:",
    ),
    "longdialogue_qa_eng": (metrics.any_found, 40, "{context}\n\nThe name that $$MASK$$ stands for is"),
    "math_find": (metrics.first_number, 12, "{context}\n\n{input}\n\nThe number is"),
    "code_debug": (metrics.first_letter, 5, "{context}\n\n{input}\n{options}\nThe letter:"),
}
"""Of each task: metric, new tokens, prompt.

New tokens are those of the original, but more where an answer is a number: its digits may be a token each.
"""

_QA, _SUM = "{context}\n\nQuestion: {input}\nAnswer in a few words:", "{context}\n\n{input}\nSummary:"
_FEW = "{context}\n{input}"
LONGBENCH: dict[str, tuple[Metric, int, str]] = {
    **dict.fromkeys(("narrativeqa", "qasper"), (metrics.token_f1, 128, _QA)),
    "multifieldqa_en": (metrics.token_f1, 64, _QA),
    "multifieldqa_zh": (metrics.token_f1, 64, _QA),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), (metrics.token_f1, 32, _QA)),
    "dureader": (metrics.rouge_l, 128, _QA),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), (metrics.rouge_l, 512, _SUM)),
    "trec": (metrics.any_found, 64, _FEW),
    "lsht": (metrics.any_found, 64, _FEW),
    "triviaqa": (metrics.first_line_f1, 32, _FEW),
    "samsum": (metrics.first_line_rouge_l, 128, _FEW),
    **dict.fromkeys(
        ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
        (metrics.share_of_numbers, 32, "{context}\n\n{input}\nNumber:"),
    ),
    **dict.fromkeys(("lcc", "repobench-p"), (metrics.code_similarity, 64, "{context}{input}")),
}
"""Of each data set: metric, new tokens (LongBench's own), prompt. Where a file names classes, `only_class` judges."""


@dataclasses.dataclass(frozen=True)
class JsonlTask:
    """The lines of one file, each a prompt. `chat`: by the chat template, as both benchmarks ask of chat models."""

    name: str
    records: tuple[Mapping[str, Any], ...]
    template: str
    metric: Metric
    max_new_tokens: int
    chat: bool = False

    @property
    def distinct(self) -> int:
        """As many as there are lines."""
        return len(self.records)

    def sample(self, tokenizer: ChatTokenizer, length: int, index: int, seed: int) -> Sample:
        """Line `index`, with the middle of its context left out where the prompt would be longer than `length`."""
        record = self.records[index % len(self.records)]
        options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", record["options"], strict=False))

        def build(context: str) -> list[int]:
            fields = {"{context}": context, "{input}": record["input"], "{options}": options}
            text = self.template
            for field, value in reversed(fields.items()):  # the context last: braces in it are its own
                text = text.replace(field, value, 1)
            return encode_prompt(tokenizer, text, chat=self.chat)

        ids = truncate_middle(tokenizer, record["context"], build, length)
        return Sample(self.name, length, index, tuple(ids), record["answers"], self.max_new_tokens)

    def score(self, reply: str, answers: Sequence[str]) -> float:
        """By the task's metric."""
        return self.metric(reply, answers)


def read_infinitebench(path: str | Path) -> JsonlTask:
    """A file of InfiniteBench: {"context", "input", "answer": str | list, "options": list}.

    Its first record tells the task (`benchmark_files`), or else the file's name. Of a multiple choice the answer
    becomes its letter. Raises `ValueError` with the file and line for anything else.
    """
    records = _records(path, lambda line: _record(line, line["answer"], line.get("options") or ()))
    name, (metric, new, template) = _known(path, infinitebench_task(records[0]), INFINITEBENCH, "InfiniteBench")
    return JsonlTask(f"infinitebench-{name}", records, template, metric, new)


def read_longbench(path: str | Path) -> JsonlTask:
    """A file of LongBench: {"context", "input", "answers": list, "all_classes": list | null, "dataset": str}.

    `dataset` tells the task, or else the file's name. Raises `ValueError` with the file and line for anything else.
    """
    classes: dict[str, None] = {}
    named: dict[str, None] = {}

    def convert(line: Mapping[str, Any]) -> dict[str, Any]:
        classes.update(dict.fromkeys(map(str, line.get("all_classes") or ())))
        named.update(dict.fromkeys(filter(None, [line.get("dataset")])))
        return _record(line, line["answers"], ())

    records = _records(path, convert)
    if len(named) > 1:
        raise ValueError(f"{path} holds several data sets: {', '.join(map(str, named))}; give a file of each")
    name, (metric, new, template) = _known(path, next(iter(named), None), LONGBENCH, "LongBench")
    if classes:
        metric = partial(metrics.only_class, classes=tuple(classes))
    return JsonlTask(f"longbench-{name}", records, template, metric, new)


def truncate_middle(
    tokenizer: ChatTokenizer, context: str, build: Callable[[str], list[int]], length: int
) -> list[int]:
    """`build(context)`, or with as much of the context's beginning and end as `length` tokens hold, in equal parts.

    Raises `ValueError` when the prompt is longer than that without any context.
    """
    full = build(context)
    if len(full) <= length:
        return full
    if len(build("")) > length:
        raise ValueError(f"length {length} is too short: the prompt has {len(build(''))} tokens without its context")
    ids = tokenizer.encode(context, add_special_tokens=False)
    kept = length - len(build(""))
    while True:
        half = max(kept, 0) // 2
        text = tokenizer.decode(ids[: max(kept, 0) - half]) + tokenizer.decode(ids[len(ids) - half :])
        found = build(text if kept > 0 else "")
        if len(found) <= length:
            return found
        kept -= len(found) - length


def _known(path: str | Path, found: Any, table: dict[str, Any], benchmark: str) -> tuple[str, Any]:
    """The task that the content tells, or else the file's name: with the name of its own."""
    name = Path(path).stem if found is None else str(found)
    task = name.removesuffix("_e")  # LongBench-E's files end in _e: other samples of the same task
    if task not in table:
        what = "neither content nor name tell" if found is None else f"{found!r} is no"
        raise ValueError(f"{path}: {what} a task of {benchmark}; there are {', '.join(table)}")
    return name, table[task]


def _record(line: Mapping[str, Any], answer: Any, options: Sequence[str]) -> dict[str, Any]:
    answers: list[Any] = [answer] if isinstance(answer, str | int | float) else list(answer)
    if options:
        letters = dict(zip(options, "ABCD", strict=False))
        answers = [letters.get(text, text) for text in answers]
    if not answers or not isinstance(line["context"], str):
        raise ValueError("no answer, or a context that is no text")
    return {
        "context": line["context"],
        "input": str(line["input"]),
        "answers": tuple(map(str, answers)),
        "options": tuple(options),
    }


def _records(path: str | Path, convert: Callable[[Any], dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    found = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    found.append(convert(json.loads(line)))
                except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: {type(error).__name__} {error}") from None
    if not found:
        raise ValueError(f"{path} holds no line")
    return tuple(found)
