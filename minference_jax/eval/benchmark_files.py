"""Which task of InfiniteBench a record is of, by what it holds: its files carry no field that says so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def infinitebench_task(record: Mapping[str, Any]) -> str | None:
    """The task's name, by a record's `context`, `input` and `options`; None where they fit none.

    Pass keys, numbers and keys are asked for by those words. Dialogues have a masked name, lists of numbers nothing but
    numbers. Books are told apart by what is asked: a choice, a question, or nothing (a summary).
    """
    context, question = record["context"], record["input"].lower()
    if "$$mask$$" in (context + question).lower():
        return "longdialogue_qa_eng"
    for words, name in (
        ("pass key", "passkey"),
        ("sequence of digits", "number_string"),
        ("specified key", "kv_retrieval"),
    ):
        if words in question:
            return name
    if not record["options"] and re.fullmatch(r"[\s\[\],.\d-]+", context[:2000]):
        return "math_find"
    if record["options"]:
        return "code_debug" if context.count("\ndef ") + context.count("    return") > 5 else "longbook_choice_eng"
    if len(context) < 10_000:  # no book: nothing tells what it is
        return None
    if not question.strip():
        return "longbook_sum_eng"
    return "longbook_qa_chn" if len(_CHINESE.findall(question)) > len(question) / 3 else "longbook_qa_eng"
