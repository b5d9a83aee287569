"""Every sample through every method, in padded batches of one shape per bucket, resumable.

A batch is one call of `generate`: a prefill program and a decoding program per bucket, method and batch size, whatever
the prompts are. Batches are always full (the last one repeats a prompt), so their size never changes a program.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from minference_jax.eval.methods import Method
from minference_jax.eval.results import Result, ResultFile
from minference_jax.eval.samples import Sample, Task
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama
from minference_jax.planning.buckets import bucket_length

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
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
    deadline: float | None = None,
) -> list[Result]:
    """Runs `samples` samples of each task at each length by each method.

    **Arguments:**

    - `tokenizer`: of the model; `encode`, `decode`, `apply_chat_template` and `eos_token_ids` are used.
    - `batch`: prompts at once. `density`: the largest share of visited keys that methods are made for.
    - `seed`: of the prompts. The same for all methods, which therefore see the same prompts.
    - `path`: a JSONL file that results are appended to after each batch. Where it exists, what it holds is not run
      again; a run that was killed and started again ends with the same results.
    - `settings`: what else makes runs different, such as the model's name; the file keeps it and refuses another.
    - `deadline`: of `time.monotonic()`; no batch starts after it.

    Lengths that a task cannot have (its text is too short, or the prompt too long without one) raise `ValueError`;
    those that its first prompt cannot have, before anything runs.
    """
    for task in tasks:
        for length in lengths:
            task.sample(tokenizer, length, 0, seed)
    kept = {"lengths": list(lengths), "samples": samples, "batch": batch, "density": density, "seed": seed}
    kept |= {"tasks": [task.name for task in tasks], "methods": [method.name for method in methods]}
    file = None if path is None else ResultFile(path, kept | (settings or {}))
    results = [] if file is None else file.results
    done = {result.key for result in results}
    total, models = samples * len(tasks) * len(lengths) * len(methods), {}
    for length in lengths:
        for task in tasks:
            prompts = [task.sample(tokenizer, length, index, seed) for index in range(samples)]
            for method in methods:
                for group in batches(prompts, batch):
                    missing = [s for s in group if (method.name, s.task, s.length, s.index) not in done]
                    if not missing:
                        continue
                    if deadline is not None and time.monotonic() > deadline:
                        return results
                    if progress is not None:
                        progress(len(done), total, f"{method.name}, {task.name}, {length:,} tokens")
                    where = method.name, length
                    if where not in models:
                        models[where] = model.with_patterns(method.choose(model, length, density))
                    new = run_batch(models[where], tokenizer, task, group, method.name, batch)
                    new = [result for result in new if result.key not in done]
                    if file is None:
                        results.extend(new)
                    else:
                        file.append(new)
                    done |= {result.key for result in new}
    if progress is not None:
        progress(len(done), total, "done")
    return results


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
    tokens, lengths = padded([sample.tokens for sample in group], batch)
    if group[0].max_new_tokens == 0:
        likelihoods, info = model.token_log_likelihoods(jnp.asarray(tokens), jnp.asarray(lengths), return_info=True)
        scores = np.asarray(likelihoods, np.float64)
        found: list[dict[str, Any]] = [
            {"nll": -float(scores[i].sum()) / (len(sample.tokens) - 1), "tokens": len(sample.tokens) - 1}
            for i, sample in enumerate(group)
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
    return [
        Result(method, sample.task, sample.length, sample.index, about=dict(sample.about), **result, **info)
        for sample, result, info in zip(group, found, measured, strict=True)
    ]


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
