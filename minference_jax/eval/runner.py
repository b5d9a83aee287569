"""Every sample through every method, in padded batches of one shape per bucket, resumable.

A batch is one call of `generate`: a prefill program and a decoding program per bucket, method and batch size, whatever
the prompts are. Batches are always full (the last one repeats a prompt), so their size never changes a program.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from minference_jax.eval.methods import Method
from minference_jax.eval.results import Result, ResultFile, Results
from minference_jax.eval.samples import Sample, Task, available, check_length
from minference_jax.jobs.choices import choice_ids, choice_log_probabilities
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama
from minference_jax.planning.buckets import bucket_length
from minference_jax.runs.identity import content_digest, model_identity
from minference_jax.runs.lock import locked
from minference_jax.text.prompts import PromptRunner

Progress = Callable[[int, int, str], None]
"""Called with samples done, their total, and what is next."""


def evaluate(
    model: Llama,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    lengths: Sequence[int],
    methods: Sequence[Method],
    samples: int = 50,
    batch: int = 8,
    density: float = 0.35,
    seed: int = 0,
    path: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    wait: bool = False,
    progress: Progress | None = None,
    deadline: float | None = None,
) -> list[Result]:
    """Runs `samples` samples of each task at each length by each method.

    **Arguments:**

    - `tokenizer`: of the model; `encode`, `decode`, `apply_chat_template` and `eos_token_ids` are used.
    - `samples`: of each task at each length, fewer where a task has fewer.
    - `batch`: prompts at once. `density`: the largest share of visited keys that methods are made for.
    - `seed`: of the prompts. The same for all methods, which therefore see the same prompts.
    - `path`: a JSONL file that results are appended to after each batch. Where it exists, what it holds is not run
      again; a run that was killed and started again ends with the same results. The file keeps what made the results,
      by content: weights, tokenizer, tasks with their texts, methods with their patterns, settings, and the package's
      version. A run of anything else is refused.
    - `about`: more to say in the file, such as the model's name. It makes no run different.
    - `wait`: where another process works on `path`, wait until it is done.
    - `deadline`: of `time.monotonic()`; no batch starts after it.

    Lengths that a task cannot have (its text is too short, or the prompt too long without one) raise `ValueError`;
    those that its first prompt cannot have, before anything runs. So do names that occur twice and settings out of
    range. Where another process works on `path`, `LockedError` names its process id.
    """
    settings = run_settings(tokenizer, tasks, methods, lengths, samples, batch, density, seed)
    with contextlib.ExitStack() as stack:
        kept: Results = Results()
        if path is not None:
            stack.enter_context(locked(path, wait=wait))
            kept = ResultFile(path, model_identity(model, tokenizer) | settings, about)
        total = sum(available(task, samples) for task in tasks) * len(lengths) * len(methods)
        models: dict[tuple[str, int], Llama] = {}
        for length, task in itertools.product(lengths, tasks):
            prompts = [task.sample(tokenizer, length, index, seed) for index in range(available(task, samples))]
            for method, group in itertools.product(methods, list(batches(prompts, batch))):
                if all((method.name, s.task, s.length, s.index) in kept for s in group):
                    continue
                if deadline is not None and time.monotonic() > deadline:
                    return kept.results
                if progress is not None:
                    progress(len(kept.results), total, f"{method.name}, {task.name}, {length:,} tokens")
                where = method.name, length
                if where not in models:
                    models[where] = model.with_patterns(method.choose(model, length, density))
                kept.append(run_batch(models[where], tokenizer, task, group, method.name, batch))
        if progress is not None:
            progress(len(kept.results), total, "done")
        return kept.results


def run_settings(
    tokenizer: Any,
    tasks: Sequence[Task],
    methods: Sequence[Method],
    lengths: Sequence[int],
    samples: int,
    batch: int,
    density: float,
    seed: int,
) -> dict[str, Any]:
    """What makes results beside the model, as names and hashes of content: settings, tasks, methods.

    Raises, without a model, what `evaluate` raises before anything runs.
    """
    _check(lengths, [task.name for task in tasks], [method.name for method in methods], samples, batch, density)
    for task in tasks:
        for length in lengths:
            sample = task.sample(tokenizer, length, 0, seed)
            if sample.choices:
                choice_ids(tokenizer, sample.choices)
    found: dict[str, Any] = {"lengths": list(lengths), "samples": samples, "batch": batch}
    return found | {
        "density": density,
        "seed": seed,
        "tasks": {task.name: content_digest(task) for task in tasks},
        "methods": {method.name: content_digest(method) for method in methods},
    }


def _check(
    lengths: Sequence[int], tasks: Sequence[str], methods: Sequence[str], samples: int, batch: int, density: float
) -> None:
    for name, values in (("lengths", lengths), ("tasks", tasks), ("methods", methods)):
        if not values:
            raise ValueError(f"{name}: there must be at least one")
        if len(set(values)) < len(values):
            raise ValueError(f"{name} must differ from each other, got {', '.join(map(str, values))}")
    for length in lengths:
        check_length(length)
    for name, value in (("samples", samples), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")


def batches(prompts: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Groups of up to `size` prompts of one bucket, in order."""
    buckets: dict[tuple[int, int], list[Sample]] = {}
    for sample in prompts:
        buckets.setdefault((bucket_length(len(sample.tokens)), sample.max_new_tokens), []).append(sample)
    for group in buckets.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def run_batch(
    model: Llama, tokenizer: Any, task: Task, group: Sequence[Sample], method: str, batch: int
) -> list[Result]:
    """The results of up to `batch` samples, run as one full batch."""
    started = time.perf_counter()
    tokens, lengths = padded([sample.tokens for sample in group], batch)
    found: list[dict[str, Any]]
    if group[0].choices:
        found, info = _chosen(model, tokenizer, task, group, tokens, lengths)
        measured = _measured(info, len(group))
    elif group[0].max_new_tokens == 0:
        likelihoods, info = model.token_log_likelihoods(jnp.asarray(tokens), jnp.asarray(lengths), return_info=True)
        scores = np.asarray(likelihoods, np.float64)
        scored = [sample.scored or range(1, len(sample.tokens)) for sample in group]
        found = [
            {"nll": -float(scores[i, list(places)].mean()), "tokens": len(places)} for i, places in enumerate(scored)
        ]
        measured = _measured((info,), len(group))
    else:
        answer = generate(
            model,
            tokens,
            lengths,
            max_new_tokens=group[0].max_new_tokens,
            eos_token_ids=tokenizer.eos_token_ids,
            return_info=True,
        )
        replies = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answer.sequences()[: len(group)]]
        found = [
            {"reply": reply, "score": float(task.score(reply, sample.answers))}
            for reply, sample in zip(replies, group, strict=True)
        ]
        measured = _measured(answer.info, len(group))
    share = round((time.perf_counter() - started) / len(group), 6)
    return [
        Result(
            *(method, sample.task, sample.length, sample.index),
            about=dict(sample.about),
            answers=sample.answers,
            **result,
            **info,
            seconds=share,
        )
        for sample, result, info in zip(group, found, measured, strict=True)
    ]


def _chosen(
    model: Llama, tokenizer: Any, task: Task, group: Sequence[Sample], tokens: np.ndarray, lengths: np.ndarray
) -> tuple[list[dict[str, Any]], Sequence[Any]]:
    """The likeliest choice of each sample."""
    labels = [choice_ids(tokenizer, sample.choices) for sample in group]
    labels += [labels[-1]] * (len(tokens) - len(group))
    run = PromptRunner(model, None, None, True, None)
    room = bucket_length(max(len(label) for row in labels for label in row))
    logits, cache, _ = run(tokens, lengths, None, room)
    best = choice_log_probabilities(model, logits, cache, labels).argmax(-1)
    replies = [sample.choices[int(place)] for sample, place in zip(group, best, strict=False)]
    found = [
        {"reply": reply, "score": float(task.score(reply, sample.answers))}
        for reply, sample in zip(replies, group, strict=True)
    ]
    return found, run.info


def padded(prompts: Sequence[Sequence[int]], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens `[batch, t]` with t a bucket, and lengths `[batch]`; missing rows repeat the last prompt."""
    rows = [*prompts, *[prompts[-1]] * (batch - len(prompts))]
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((batch, bucket_length(int(lengths.max()))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, lengths


def _measured(info: Sequence[Any], count: int) -> list[dict[str, Any]]:
    """Density and estimated recall of each sequence, over layers, heads and the parts of the prefill."""
    if info[0] is None:
        return [{"density": 1.0, "recall": 1.0}] * count
    density, recall = (
        np.asarray(jnp.stack([jnp.mean(getattr(part, name), axis=(0, 2)) for part in info]).mean(0))
        for name in ("density", "recall")
    )
    return [{"density": round(float(density[i]), 6), "recall": round(float(recall[i]), 6)} for i in range(count)]
