"""One reply for each row, in full batches of prompts of about one length; what is done is kept.

Batches are formed from all rows before the first one runs, and what the prompts share at their beginning is processed
once: a job that was killed and goes on makes the same batches from the same cache, so it gives the same replies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minference_jax.jobs.batch_runner import BatchRunner, Reply, batches, shared_tokens
from minference_jax.jobs.choices import choice_ids
from minference_jax.jobs.json_schema import JsonSchema
from minference_jax.jobs.output import JobFile, job_settings
from minference_jax.jobs.prompt_template import PromptTemplate
from minference_jax.models.config import LlamaConfig
from minference_jax.models.llama import Llama
from minference_jax.models.requests import check_context
from minference_jax.planning.buckets import bucket_length
from minference_jax.planning.memory import device_bytes, prompts_at_once
from minference_jax.runs.identity import content_digest, model_identity
from minference_jax.runs.lock import locked

Progress = Callable[[int, int], None]
"""Called with rows done and their total."""

MOST_AT_ONCE = {"cpu": 8, "gpu": 64}
"""Prompts at once, where their number is not given. A GPU takes about as long for a token of 64 replies as of one."""


def batch_replies(
    model: Llama,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    template: PromptTemplate,
    *,
    out: str | Path | None = None,
    choices: Sequence[str] = (),
    json_schema: Any = None,
    max_new_tokens: int = 256,
    batch: int | None = None,
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
    - `json_schema`: a JSON schema, as `json.loads` gives it, that replies fit (those that `max_new_tokens` does not cut
      short). Each token is the likeliest of those that a fitting text can go on with.
    - `batch`: prompts at once. A batch has prompts of one length bucket, and is filled up with shorter ones, or else by
      repeating its last. None: as many as `out` was begun with; for a new job as many as fit in memory, up to 8 on a
      CPU and 64 on a GPU.
    - `system`: the system message; `raw`: no chat template, the prompt is continued as it is.
    - `wait`: where another process works on `out`, wait until it is done.

    **Raises:** ValueError for a row that lacks a field, a prompt longer than the model's context (naming the row), and
    settings out of range, before anything runs; `LockedError` where another process works on `out`.
    """
    settings: dict[str, Any] = {"choices": choices, "json_schema": json_schema, "max_new_tokens": max_new_tokens}
    job = BatchJob.of(model.config, tokenizer, rows, template, batch=batch, system=system, raw=raw, **settings)
    return job.run(model, tokenizer, out=out, wait=wait, progress=progress)


@dataclasses.dataclass(frozen=True)
class BatchJob:
    """What `batch_replies` is asked to do, checked, which takes no weights: `of` raises what is wrong with it.

    - `prompts`: token ids of each row. `labels`: of each label. `schema`: of replies in JSON.
    - `room`: tokens of a reply, at most.
    - `batch`: prompts at once; None: chosen when the model is there.
    """

    prompts: tuple[list[int], ...]
    labels: Mapping[str, list[int]]
    schema: JsonSchema | None
    room: int
    batch: int | None

    @classmethod
    def of(
        cls,
        config: LlamaConfig,
        tokenizer: Any,
        rows: Sequence[Mapping[str, Any]],
        template: PromptTemplate,
        *,
        choices: Sequence[str] = (),
        json_schema: Any = None,
        max_new_tokens: int = 256,
        batch: int | None = None,
        system: str = "",
        raw: bool = False,
    ) -> BatchJob:
        """The job of these rows, for a model of this config. Arguments and errors are those of `batch_replies`."""
        if (batch is not None and batch < 1) or max_new_tokens < 1:
            raise ValueError(f"batch and max_new_tokens must be at least 1, got {batch} and {max_new_tokens}")
        if not rows:
            raise ValueError("rows: there must be at least one")
        if raw and system:
            raise ValueError("a raw prompt has no system message")
        if choices and json_schema is not None:
            raise ValueError("choices and json_schema cannot both say what a reply is")
        template.check(rows)
        labels = choice_ids(tokenizer, choices) if choices else []
        schema = None if json_schema is None else JsonSchema(json_schema, tokenizer, config.vocab_size)
        room = max(map(len, labels)) if labels else max_new_tokens
        prompts = tuple(_prompt(tokenizer, template.fill(row), system, raw) for row in rows)
        _check_lengths(config, prompts, room)
        return cls(prompts, dict(zip(choices, labels, strict=True)), schema, room, batch)

    def settings(self) -> dict[str, Any]:
        """What decides the replies beside the model, as far as it is known without it, for `output.check_job_file`."""
        known = {
            "choices": list(self.labels),
            "json_schema": None if self.schema is None else json.dumps(self.schema.schema),  # its order counts
            "max_new_tokens": 0 if self.labels else self.room,
            "prompts": content_digest([np.asarray(prompt, np.int32) for prompt in self.prompts]),
        }
        return known if self.batch is None else known | {"batch": self.batch}

    def run(
        self,
        model: Llama,
        tokenizer: Any,
        *,
        out: str | Path | None = None,
        wait: bool = False,
        progress: Progress | None = None,
    ) -> list[Reply]:
        """The replies, in the order of the rows. Arguments and errors are those of `batch_replies`."""
        shared = shared_tokens(self.prompts)
        sizes = [len(prompt) - shared for prompt in self.prompts]
        with contextlib.ExitStack() as stack:
            file, kept, batch = None, {}, self.batch
            if out is not None:
                stack.enter_context(locked(out, wait=wait))
                # What fits may differ from one device to another, and from the default of another version.
                batch = batch or job_settings(out).get("batch") or self._at_once(model)
                made_by = model_identity(model, tokenizer) | self.settings() | {"batch": batch}
                made_by["model"] = content_digest((model.config, model.patterns, model.auto))
                file = JobFile(out, made_by)
                kept = file.rows
            batch = batch or self._at_once(model)
            groups = batches(sizes, batch, lambda bucket: model.patterns_at(bucket, shared + bucket))
            at_once = min(batch, max(map(len, groups)))
            kind = {"labels": self.labels, "schema": self.schema}
            runner = BatchRunner(model, tokenizer, self.prompts, shared, at_once, self.room, **kind)
            replies = {row: Reply(**value) for row, value in kept.items()}
            for group in groups:
                if progress is not None:
                    progress(len(replies), len(self.prompts))
                if all(row in replies for row in group):
                    continue
                new = runner(group)
                if file is not None:
                    file.append([dataclasses.asdict(reply) for reply in new])
                replies |= {reply.row: reply for reply in new}
            if file is not None:
                file.finish()
            if progress is not None:
                progress(len(self.prompts), len(self.prompts))
            return [replies[row] for row in range(len(self.prompts))]

    def _at_once(self, model: Llama) -> int:
        """Prompts at once of a new job whose batch was not given: as many as the device takes."""
        longest = bucket_length(max(map(len, self.prompts))) + bucket_length(self.room)
        return prompts_at_once(
            model.config,
            device_bytes(),
            MOST_AT_ONCE.get(jax.default_backend(), MOST_AT_ONCE["cpu"]),
            tokens=longest,
            dtype=model.dtype.name,
            fp8_projections=model.fp8_projections,
            patterns=model.patterns_at(longest),
            mesh=model.mesh,
        )


def _prompt(tokenizer: Any, text: str, system: str, raw: bool) -> list[int]:
    if raw:
        return tokenizer.encode(text)
    messages = [{"role": "system", "content": system}] if system else []
    return tokenizer.apply_chat_template([*messages, {"role": "user", "content": text}])


def _check_lengths(config: LlamaConfig, prompts: Sequence[Sequence[int]], room: int) -> None:
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    try:
        check_context(config, len(prompts[longest]), room, strict=True)
    except ValueError as error:
        raise ValueError(f"row {longest}: {error}") from None
    empty = [row for row, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"row {empty[0]} has an empty prompt")
