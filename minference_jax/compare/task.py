"""compare_task(): a task's prompts through PyTorch and through JAX: scores, logits and continuations side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minference_jax.compare.api import compare
from minference_jax.compare.comparison import Comparison
from minference_jax.eval.metrics import wilson
from minference_jax.eval.samples import Sample, Task, check_length
from minference_jax.extras import naming_extra

if TYPE_CHECKING:
    from rich.console import Group

LOGIT_POSITIONS = 32
"""Evenly spread positions whose logits are compared, besides the last one of each prompt."""


@dataclasses.dataclass(frozen=True)
class TaskComparison:
    """One task by both sides. Replies end at the first end-of-text token.

    - `scores_ours`, `scores_torch`: of each sample, in [0, 1]; `replies_ours`, `replies_torch`: their texts.
    - `answers`: those that were right, of each sample.
    - `same_replies`: share of samples whose replies are equal token for token.
    - `comparison`: of logits, perplexity and continuations, as `compare` gives it for these prompts.
    """

    task: str
    length: int
    scores_ours: tuple[float, ...]
    scores_torch: tuple[float, ...]
    replies_ours: tuple[str, ...]
    replies_torch: tuple[str, ...]
    same_replies: float
    comparison: Comparison
    answers: tuple[tuple[str, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All fields, of types that `json.dumps` writes."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"comparison": self.comparison.to_dict()}


def compare_task(
    model: str | Path,
    task: Task,
    *,
    length: int = 1024,
    samples: int = 8,
    seed: int = 0,
    tokenizer: Any = None,
    **options: Any,
) -> TaskComparison:
    """Runs `samples` prompts of `task`, of up to `length` tokens, with Hugging Face PyTorch and with JAX.

    Args:
        model: a Hugging Face directory or a GGUF file.
        task: of `minference_jax.eval.tasks.make_tasks`, one that asks for replies.
        length, samples, seed: of the prompts, as `evaluate` makes them.
        tokenizer: of the model; None loads it.
        options: as for `compare`: dtype, patterns (of our side), torch_python, device, tolerance, …

    Raises:
        ValueError: for a task without replies, and as `compare`.
    """
    if tokenizer is None:
        from minference_jax.text.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(model)
    check_length(length)
    prompts = [task.sample(tokenizer, length, index, seed) for index in range(samples)]
    if not prompts or not prompts[0].max_new_tokens:
        raise ValueError(f"{task.name} with {samples} samples has no replies to compare")
    sizes = [len(prompt.tokens) for prompt in prompts]
    tokens = np.zeros((samples, max(sizes)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt.tokens)] = prompt.tokens
    spread = np.linspace(0, min(sizes) - 1, LOGIT_POSITIONS).round().astype(int)
    comparison = compare(
        model,
        tokens,
        lengths=np.asarray(sizes),
        max_new_tokens=max(prompt.max_new_tokens for prompt in prompts),
        positions=sorted({*spread.tolist(), *(size - 1 for size in sizes)}),
        layers=False,
        **options,
    )
    return judge(task, length, prompts, comparison, tokenizer)


def judge(task: Task, length: int, prompts: Sequence[Sample], comparison: Comparison, tokenizer: Any) -> TaskComparison:
    """Scores both sides' continuations."""
    ours, theirs = (
        [until_end(row[: one.max_new_tokens], tokenizer.eos_token_ids) for row, one in zip(rows, prompts, strict=True)]
        for rows in (comparison.greedy_ours, comparison.greedy_torch)
    )
    texts = [tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in side) for side in (ours, theirs)]
    scores = [
        tuple(float(task.score(text, prompt.answers)) for text, prompt in zip(side, prompts, strict=True))
        for side in texts
    ]
    same = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(prompts)
    right = tuple(prompt.answers for prompt in prompts)
    return TaskComparison(task.name, length, scores[0], scores[1], texts[0], texts[1], same, comparison, right)


def until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The ids before the first that is an end of text."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:stop])


def task_table(result: TaskComparison) -> Group:
    """A rich renderable: the scores of both sides, and the comparison of their logits."""
    with naming_extra("a table"):
        from rich import box
        from rich.console import Group
        from rich.table import Table

    from minference_jax.compare.report import comparison_table

    table = Table(title=f"{result.task}, {result.length:,} tokens", box=box.SIMPLE_HEAD)
    for column in ("", "score, %", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    for name, scores in (("PyTorch", result.scores_torch), ("JAX", result.scores_ours)):
        mean = sum(scores) / len(scores)
        low, high = wilson(mean, len(scores))
        table.add_row(name, f"{100 * mean:.1f}", f"{100 * low:.1f} to {100 * high:.1f}")
    table.add_row("same reply", f"{100 * result.same_replies:.1f}", f"of {len(result.scores_ours)} prompts")
    return Group(table, comparison_table(result.comparison))


def run_compare_task(
    model: str | Path,
    task: str,
    *,
    text: str | None = None,
    as_json: bool = False,
    page: Callable[..., None] | None = None,
    **options: Any,
) -> int:
    """The `compare --task` command: prints a report, or one JSON object.

    `page(comparison, task=result)` is called with what came out.

    Returns:
        0 if the logits and continuations are within tolerance, 1 if not. Errors are raised.
    """
    import json

    with naming_extra("a table"):
        from rich.console import Console

    from minference_jax.eval.tasks import make_tasks

    chosen, *others = make_tasks([task], text=text)
    if others:
        raise ValueError(f"{task} is a group of tasks; compare one: {', '.join(one.name for one in (chosen, *others))}")
    news = Console(stderr=True)
    tell: Callable[[str], None] = lambda line: news.print(line, highlight=False)  # noqa: E731
    with news.status("Comparing"):
        result = compare_task(model, chosen, progress=tell, **options)
    if page is not None:
        page(result.comparison, task=result)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        Console().print(task_table(result))
    return 0 if result.comparison.within_tolerance else 1
