"""Prompts through the model: padded to a bucket, whole or in parts, and from where a cache leaves off."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minference_jax.models.cache import KVCache
from minference_jax.models.config import LlamaConfig
from minference_jax.models.dual_chunk import outgrows
from minference_jax.models.llama import Llama
from minference_jax.models.parts import prefill_parts
from minference_jax.planning.buckets import QUERY_TILE, bucket_length


class PromptRunner:
    """Runs prompts through the model: whole or in parts, and from where a cache leaves off."""

    def __init__(
        self,
        model: Llama,
        chunk: int | None,
        implementation: str | None,
        return_info: bool,
        progress: Any,
        cache_dtype: str | None = None,
    ):
        self._model, self._chunk, self._implementation = model, chunk, implementation
        self._return_info, self._progress, self._cache_dtype = return_info, progress, cache_dtype
        self.info: list[Any] = []

    def __call__(
        self, prompts: np.ndarray, sizes: np.ndarray, cache: KVCache | None, new: int
    ) -> tuple[Array, KVCache, int]:
        """Last-token logits, the cache with room for `new` more tokens, and how many tokens came from `cache`."""
        start = 0 if cache is None else shared_prefix(self._model.config, prompts, sizes, cache)
        rows, chunk = self._rows(sizes, start)
        config, capacity = self._model.config, start + rows + new
        if cache is not None and start and outgrows(config, cache.capacity, bucket_length(capacity)):
            start = 0
            rows, chunk = self._rows(sizes, start)
            capacity = rows + new
        if cache is not None and ((start == 0 and cache.capacity < capacity) or cache.lengths.shape != sizes.shape):
            # Nothing of it is used: a new one takes its place, rather than a copy of it.
            kind = cache.k.dtype if self._cache_dtype is None else self._cache_dtype
            cache.release()
            cache = self._empty(len(sizes), capacity, kind)
        elif cache is None:
            cache = self._empty(len(sizes), capacity, self._cache_dtype)
        else:
            cache = cache.on_device()
            cache = cache if cache.capacity >= capacity else cache.grown(bucket_length(capacity))
        logits, cache = self._run(prompts, sizes, cache, start, rows, chunk)
        return logits, cache, start * len(sizes)

    def _rows(self, sizes: np.ndarray, start: int) -> tuple[int, int]:
        """Rows to process from `start` on, with their padding, and how many at once."""
        rows = bucket_length(int(sizes.max()) - start)
        chunk = min(self._chunk or rows, rows)
        return -(-rows // chunk) * chunk, chunk

    def _empty(self, batch: int, capacity: int, dtype: Any) -> KVCache:
        """A new cache, committed to the model's device, as one that comes back from the host is: JAX compiles a program
        for committed arrays and another one for those that are not."""
        cache = self._model.init_cache(batch, capacity, dtype)
        if self._model.mesh is not None:
            return cache
        weights = next(iter(self._model.params().values()))
        alone = isinstance(weights, Array) and len(weights.sharding.device_set) == 1
        return jax.device_put(cache, weights.sharding) if alone else cache

    def again(self, cache: KVCache, token: np.ndarray, finished: np.ndarray) -> tuple[Array, KVCache]:
        """Processes everything in the cache, and one token more, with the RoPE of the new lengths."""
        sizes = np.asarray(cache.lengths) + ~finished
        prompts = np.array(cache.tokens)
        prompts[np.arange(len(sizes)), sizes - 1] = np.where(finished, prompts[np.arange(len(sizes)), sizes - 1], token)
        rows = min(bucket_length(int(sizes.max())), cache.capacity)
        return self._run(prompts, sizes, cache, 0, rows, rows)

    def _run(
        self, prompts: np.ndarray, sizes: np.ndarray, cache: KVCache, start: int, rows: int, chunk: int
    ) -> tuple[Array, KVCache]:
        padded = np.zeros((len(sizes), start + rows), np.int32)
        width = min(padded.shape[1], prompts.shape[1])
        padded[:, :width] = prompts[:, :width]
        sizes = sizes.astype(np.int32)
        longest = int(sizes.max())
        place = partial(self._model.exchange.place, self._model.config)
        new, lengths = place((jnp.asarray(padded[:, start:]), jnp.asarray(sizes)))
        options = {
            "rope_lengths": lengths,
            "implementation": self._implementation,
            "return_info": self._return_info,
        }
        if start == 0 and chunk == rows:
            result = self._model.prefill(new, lengths, cache, **options)
            self._after(longest, longest, result[0], result[2] if self._return_info else None)
            return result[0], result[1]
        # The last part that holds a token is the last that runs.
        new = new[:, : -(-(longest - start) // chunk) * chunk]
        part = None
        for part in prefill_parts(self._model.prefill, new, lengths, cache, chunk=chunk, start=start, **options):
            self._after(min(start + part.done, longest), longest, part.logits, part.info)
        assert part is not None
        return part.logits, part.cache

    def _after(self, done: int, of: int, logits: Array, info: Any) -> None:
        if self._return_info:
            self.info.append(info)
        if self._progress is not None:
            jax.block_until_ready(logits)
            self._progress(done, of)


def shared_prefix(config: LlamaConfig, prompts: np.ndarray, sizes: np.ndarray, cache: KVCache) -> int:
    """Positions, a multiple of 128, that every sequence shares with its cache and that need no new processing.

    One token of each prompt is left to process, since its logits are needed. Keys are rotated for the length at
    their time, so where RoPE depends on the length a cache is of use only while the frequencies stay.
    """
    lengths, old = np.asarray(cache.lengths), np.asarray(cache.tokens)
    if lengths.shape != sizes.shape:
        return 0
    trained = config.rope.original_max_position_embeddings or 0
    if config.rope.depends_on_length and (np.any(lengths > trained) or np.any(sizes > trained)):
        stays = config.rope.kind == "longrope" and np.array_equal(lengths > trained, sizes > trained)
        if not stays:
            return 0
    width = min(prompts.shape[1], old.shape[1])
    known = np.minimum(np.minimum(lengths, sizes - 1), width)[:, None]
    same = (prompts[:, :width] == old[:, :width]) & (np.arange(width) < known)
    shared = np.logical_and.accumulate(same, axis=1).sum(axis=1).min()
    return int(shared) // QUERY_TILE * QUERY_TILE


def steps_before_new_rope(config: LlamaConfig, cache: KVCache, finished: np.ndarray) -> int | None:
    """Steps until a sequence outgrows the context that its LongRoPE factors are for; None if none will.

    Keys and queries must share the factors, so the whole sequence is then processed again (as transformers does for
    Phi-3). Dynamic NTK scaling drifts with every token instead; old keys keep their rotation, as in transformers.
    """
    if config.rope.kind != "longrope":
        return None
    left = (config.rope.original_max_position_embeddings or 0) - np.asarray(cache.lengths)
    return min(left[(left >= 0) & ~finished].tolist(), default=None)
