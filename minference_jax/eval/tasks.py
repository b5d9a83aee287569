"""Tasks by name, one by one and in groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minference_jax.data import load_text
from minference_jax.eval.jsonl import read_infinitebench, read_longbench
from minference_jax.eval.needle import NeedleTask
from minference_jax.eval.perplexity import Perplexity
from minference_jax.eval.retrieval import HiddenNumber, KeyValue
from minference_jax.eval.ruler_niah import KINDS, RulerNeedle
from minference_jax.eval.ruler_qa import RulerQuestions
from minference_jax.eval.ruler_tracing import CommonWords, FrequentWords, VariableTracking
from minference_jax.eval.samples import Task
from minference_jax.eval.turns import Turns

GROUPS: dict[str, tuple[str, ...]] = {
    "niah": tuple(f"needle-{kind}-{mode}" for kind in ("magic", "address") for mode in ("raw", "prefix")),
    "retrieval": ("passkey", "number", "kv"),
    "ruler": tuple(f"ruler-{name}" for name in (*KINDS, "vt", "cwe", "fwe", "qa_1", "qa_2")),
}
"""Names that stand for several tasks. RULER's questions are in it only where a file of them is given."""


def known_tasks(text: str, qa: Sequence[str | Path] = ()) -> dict[str, Task]:
    """Every task that needs no other file, by name: with `text` as the haystack, and files of RULER's questions."""
    known: dict[str, Task] = {f"ruler-{name}": RulerNeedle(name, text) for name in KINDS}
    for kind in ("magic", "address"):
        for mode in ("raw", "prefix", "chat"):
            task = NeedleTask(kind, mode, text)
            known[task.name] = task
    others = (HiddenNumber("passkey"), HiddenNumber("number"), KeyValue(), Perplexity(text), Turns(text))
    known |= {task.name: task for task in (*others, VariableTracking(), CommonWords(text), FrequentWords())}
    questions = zip(("ruler-qa_1", "ruler-qa_2"), qa, strict=False)
    return known | {name: RulerQuestions.read(path, name) for name, path in questions}


def make_tasks(
    names: Sequence[str],
    *,
    text: str | None = None,
    qa: Sequence[str | Path] = (),
    files: Sequence[str | Path] = (),
) -> list[Task]:
    """The tasks that `names` ask for, each once, in their order.

    **Arguments:**

    - `names`: of tasks or of `GROUPS`; "infinitebench" and "longbench" read `files`.
    - `text`: the haystack, and what perplexity is measured on; the package's excerpt of a novel unless given.
    - `qa`: files in SQuAD's format for `ruler-qa_1` and, the second, `ruler-qa_2`.
    - `files`: JSONL files of InfiniteBench or LongBench.

    Raises `ValueError` for an unknown name, and for a task whose file is missing or wrong.
    """
    if len(qa) > 2:
        raise ValueError(f"qa: {len(qa)} files of questions, but RULER has two tasks for them")
    text = load_text() if text is None else text
    if not text.strip():
        raise ValueError("text is empty: there is nothing to hide a needle in, or to measure perplexity on")
    if files and not {"infinitebench", "longbench"} & set(names):
        raise ValueError(f"files: {files[0]} is read by the tasks infinitebench and longbench only")
    if qa and not {"ruler", "ruler-qa_1", "ruler-qa_2"} & set(names):
        raise ValueError(f"qa: {qa[0]} is read by the tasks ruler, ruler-qa_1 and ruler-qa_2 only")
    known = known_tasks(text, qa)
    chosen: dict[str, Task] = {}
    for name in names:
        if name in ("infinitebench", "longbench"):
            if not files:
                raise ValueError(f"{name} needs its JSONL files")
            read = read_infinitebench if name == "infinitebench" else read_longbench
            for path in files:
                task = read(path)
                if task.name in chosen:
                    raise ValueError(f"{path}: another file is named {task.name} too")
                chosen[task.name] = task
            continue
        if name in ("ruler-qa_1", "ruler-qa_2") and name not in known:
            raise ValueError(f"{name} needs a file of questions in SQuAD's format")
        if name not in GROUPS and name not in known:
            raise ValueError(f"no task is named {name!r}; there are {', '.join((*GROUPS, *sorted(known)))}")
        chosen |= {one: known[one] for one in GROUPS.get(name, (name,)) if one in known}
    return list(chosen.values())
