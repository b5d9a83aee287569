"""Runs batches of prompts of about one length: replies written freely, by a schema, or chosen from labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from minference_jax.jobs.choices import choice_log_probabilities
from minference_jax.jobs.json_schema import JsonSchema, replies_by_schema
from minference_jax.models.cache import KVCache
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama
from minference_jax.planning.buckets import QUERY_TILE, bucket_length
from minference_jax.text.prompts import PromptRunner


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


def shared_tokens(prompts: Sequence[list[int]]) -> int:
    """Tokens at the beginning of all prompts, in whole query tiles; each prompt has one token more, or none at all."""
    first, last = min(prompts), max(prompts)  # what the smallest and the largest share, all share
    least = min(map(len, prompts)) - 1
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), least)
    return min(same, least) // QUERY_TILE * QUERY_TILE


def batches(sizes: Sequence[int], batch: int, attention: Callable[[int], Any]) -> list[list[int]]:
    """Rows in groups of `batch`, the longest first: memory that does not suffice shows at once.

    A group that its bucket does not fill goes on with shorter rows, which cost no more there than repeated ones, unless
    they would get another attention: `attention(bucket)` says which one prompts of a bucket get.
    """
    buckets = [bucket_length(size) for size in sizes]
    kinds = {bucket: attention(bucket) for bucket in set(buckets)}
    groups: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=lambda row: (-buckets[row], row)):
        if not groups or len(groups[-1]) == batch or kinds[buckets[groups[-1][0]]] != kinds[buckets[row]]:
            groups.append([])
        groups[-1].append(row)
    return groups


class BatchRunner:
    """Runs groups of rows. The cache of one batch, cut back to what all prompts share, serves the next one.

    **Arguments:** `prompts`: token ids of all rows, of which the first `shared` are the same. `batch`: prompts at once.
    `room`: tokens of a reply, at most. `labels`: token ids of each label, where a reply is one. `schema`: of replies in
    JSON. Without both, replies are written freely.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        shared: int,
        batch: int,
        room: int,
        labels: Mapping[str, Sequence[int]],
        schema: JsonSchema | None = None,
    ):
        self._model, self._tokenizer, self._prompts = model, tokenizer, prompts
        self._shared, self._batch, self._room = shared, batch, room
        self._labels, self._schema = labels, schema
        self._cache: KVCache | None = None

    def __call__(self, group: Sequence[int]) -> list[Reply]:
        """The replies of up to `batch` rows."""
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
        if self._schema is not None:
            written, self._cache = replies_by_schema(self._model, self._schema, tokens, sizes, cache, self._room)
            sequences, ended = written.tokens, written.done.tolist()
        else:
            ends = self._tokenizer.eos_token_ids
            options = {"max_new_tokens": self._room, "eos_token_ids": ends, "cache": cache}
            answer = generate(self._model, tokens, sizes, **options)
            self._cache, sequences = answer.cache, answer.sequences()
            ended = [ids[-1] in ends for ids in sequences]
        return [
            Reply(0, self._tokenizer.decode(ids, skip_special_tokens=True), len(ids), end)
            for ids, end in zip(sequences, ended, strict=True)
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
