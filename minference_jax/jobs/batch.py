"""One reply for each row, in full batches of one length bucket; what is done is kept.

Batches are formed from all rows before the first one runs, and what the prompts share at their beginning is processed
once: a job that was killed and goes on makes the same batches from the same cache, so it gives the same replies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from minference_jax.jobs.choices import choice_ids, choice_log_probabilities
from minference_jax.jobs.output import JobFile
from minference_jax.jobs.prompt_template import PromptTemplate
from minference_jax.models.cache import KVCache
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama
from minference_jax.models.requests import check_context
from minference_jax.planning.buckets import QUERY_TILE, bucket_length
from minference_jax.runs.identity import content_digest, model_identity
from minference_jax.runs.lock import locked
from minference_jax.text.prompts import PromptRunner

Progress = Callable[[int, int], None]
"""Called with rows done and their total."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a row got.

    - `row`: its place, from 0. `reply`: the text, or the most probable label.
    - `tokens`: tokens generated; `finished`: whether the reply came to its end, rather than to the limit.
    - `probabilities`: label → probability, of the labels alone; None without `choices`.
    """

    row: int
    reply: str
    tokens: int = 0
    finished: bool = True
    probabilities: dict[str, float] | None = None


def batch_replies(
    model: Llama,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    template: PromptTemplate,
    *,
    out: str | Path | None = None,
    choices: Sequence[str] = (),
    max_new_tokens: int = 256,
    batch: int = 8,
    system: str = "",
    raw: bool = False,
    wait: bool = False,
    progress: Progress | None = None,
) -> list[Reply]:
    """A greedy reply to `template` filled with each row, in the order of the rows.

    **Arguments:**

    - `out`: a JSONL file with a line for each row, written as batches are done. Where it exists, what it holds is not
      run again, if the same model, rows and settings made it (by content); anything else is refused.
    - `choices`: labels that a reply must be one of. The reply is the most probable one, and each one's probability is
      given; `max_new_tokens` then means nothing.
    - `batch`: prompts at once. A batch has prompts of one length bucket, and is filled up by repeating its last.
    - `system`: the system message; `raw`: no chat template, the prompt is continued as it is.
    - `wait`: where another process works on `out`, wait until it is done.

    **Raises:** ValueError for a row that lacks a field, a prompt longer than the model's context (naming the row), and
    settings out of range, before anything runs; `LockedError` where another process works on `out`.
    """
    if batch < 1 or max_new_tokens < 1:
        raise ValueError(f"batch and max_new_tokens must be at least 1, got {batch} and {max_new_tokens}")
    if not rows:
        raise ValueError("rows: there must be at least one")
    if raw and system:
        raise ValueError("a raw prompt has no system message")
    template.check(rows)
    labels = choice_ids(tokenizer, choices) if choices else []
    room = max(map(len, labels)) if labels else max_new_tokens
    prompts = [_prompt(tokenizer, template.fill(row), system, raw) for row in rows]
    _check_lengths(model, prompts, room)
    shared = _shared(prompts)
    groups = _groups([len(prompt) - shared for prompt in prompts], batch)
    with contextlib.ExitStack() as stack:
        file, kept = None, {}
        if out is not None:
            stack.enter_context(locked(out, wait=wait))
            limit = 0 if labels else max_new_tokens
            made_by = {"choices": list(choices), "max_new_tokens": limit, "batch": batch}
            file = JobFile(out, _identity(model, tokenizer, prompts) | made_by)
            kept = file.rows
        at_once = min(batch, max(map(len, groups)))
        runner = _Runner(model, tokenizer, prompts, shared, at_once, room, dict(zip(choices, labels, strict=True)))
        replies = {row: Reply(**value) for row, value in kept.items()}
        for group in groups:
            if progress is not None:
                progress(len(replies), len(rows))
            if all(row in replies for row in group):
                continue
            new = runner(group)
            if file is not None:
                file.append([dataclasses.asdict(reply) for reply in new])
            replies |= {reply.row: reply for reply in new}
        if file is not None:
            file.finish()
        if progress is not None:
            progress(len(rows), len(rows))
        return [replies[row] for row in range(len(rows))]


def _prompt(tokenizer: Any, text: str, system: str, raw: bool) -> list[int]:
    if raw:
        return tokenizer.encode(text)
    messages = [{"role": "system", "content": system}] if system else []
    return tokenizer.apply_chat_template([*messages, {"role": "user", "content": text}])


def _check_lengths(model: Llama, prompts: Sequence[Sequence[int]], room: int) -> None:
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    try:
        check_context(model.config, len(prompts[longest]), room, strict=True)
    except ValueError as error:
        raise ValueError(f"row {longest}: {error}") from None
    empty = [row for row, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"row {empty[0]} has an empty prompt")


def _shared(prompts: Sequence[list[int]]) -> int:
    """Tokens at the beginning of all prompts, in whole query tiles; each prompt has one token more, or none at all."""
    first, last = min(prompts), max(prompts)  # what the smallest and the largest share, all share
    least = min(map(len, prompts)) - 1
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), least)
    return min(same, least) // QUERY_TILE * QUERY_TILE


def _groups(sizes: Sequence[int], batch: int) -> list[list[int]]:
    """Rows of one bucket together, up to `batch` of them, the longest first: memory that does not suffice shows at
    once."""
    buckets: dict[int, list[int]] = {}
    for row, size in enumerate(sizes):
        buckets.setdefault(bucket_length(size), []).append(row)
    return [
        rows[i : i + batch] for _, rows in sorted(buckets.items(), reverse=True) for i in range(0, len(rows), batch)
    ]


def _identity(model: Llama, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    return model_identity(model, tokenizer) | {
        "model": content_digest((model.config, model.patterns, model.auto)),
        "prompts": content_digest([np.asarray(prompt, np.int32) for prompt in prompts]),
    }


class _Runner:
    """Runs groups of rows. The cache of one batch, cut back to what all prompts share, serves the next one."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        shared: int,
        batch: int,
        room: int,
        labels: Mapping[str, Sequence[int]],
    ):
        self._model, self._tokenizer, self._prompts = model, tokenizer, prompts
        self._shared, self._batch, self._room, self._labels = shared, batch, room, labels
        self._cache: KVCache | None = None

    def __call__(self, group: Sequence[int]) -> list[Reply]:
        """The replies of up to `batch` rows of one bucket."""
        rows = [*group, *[group[-1]] * (self._batch - len(group))]
        sizes = np.asarray([len(self._prompts[row]) for row in rows], np.int32)
        tokens = np.zeros((len(rows), int(sizes.max())), np.int32)
        for place, row in zip(tokens, rows, strict=True):
            place[: len(self._prompts[row])] = self._prompts[row]
        cache = self._beginning(tokens)
        found = self._choose(tokens, sizes, cache) if self._labels else self._generate(tokens, sizes, cache)
        return [dataclasses.replace(reply, row=row) for reply, row in zip(found, group, strict=False)]

    def _beginning(self, tokens: np.ndarray) -> KVCache | None:
        """A cache that holds what all prompts share; None where they share nothing."""
        if not self._shared:
            return None
        cache = self._cache
        if cache is None:
            # As long as the longest prompt needs, whichever batch is the first to run: a cache of another length would
            # be another program.
            longest = max(map(len, self._prompts)) - self._shared
            capacity = self._shared + bucket_length(longest) + bucket_length(self._room)
            empty = self._model.init_cache(len(tokens), capacity)
            _, cache = self._model.prefill(jnp.asarray(tokens[:, : self._shared]), None, empty)
        return dataclasses.replace(cache, lengths=jnp.full((len(tokens),), self._shared, jnp.int32))

    def _generate(self, tokens: np.ndarray, sizes: np.ndarray, cache: KVCache | None) -> list[Reply]:
        ends = self._tokenizer.eos_token_ids
        options = {"max_new_tokens": self._room, "eos_token_ids": ends, "cache": cache}
        answer = generate(self._model, tokens, sizes, **options)
        self._cache = answer.cache
        return [
            Reply(0, self._tokenizer.decode(ids, skip_special_tokens=True), len(ids), ids[-1] in ends)
            for ids in answer.sequences()
        ]

    def _choose(self, tokens: np.ndarray, sizes: np.ndarray, cache: KVCache | None) -> list[Reply]:
        run = PromptRunner(self._model, None, None, False, None)
        logits, self._cache, _ = run(tokens, sizes, cache, bucket_length(self._room))
        scores = choice_log_probabilities(self._model, logits, self._cache, [list(self._labels.values())] * len(tokens))
        names = list(self._labels)
        return [
            Reply(
                0,
                names[int(row.argmax())],
                len(self._labels[names[int(row.argmax())]]),
                probabilities={
                    name: round(math.exp(score), 6) for name, score in zip(names, row.tolist(), strict=True)
                },
            )
            for row in scores
        ]
