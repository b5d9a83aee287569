"""Prompts through the model: padded to a bucket, whole or in parts, and from where a cache leaves off."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minference_jax.models.buckets import QUERY_TILE, bucket_length
from minference_jax.models.cache import KVCache
from minference_jax.models.config import LlamaConfig
from minference_jax.models.llama import Llama


class PromptRunner:
    """Runs prompts through the model: whole or in parts, and from where a cache leaves off."""

    def __init__(self, model: Llama, chunk: int | None, implementation: str | None, return_info: bool, progress: Any):
        self._model, self._chunk, self._implementation = model, chunk, implementation
        self._return_info, self._progress = return_info, progress
        self.info: list[Any] = []

    def __call__(
        self, prompts: np.ndarray, sizes: np.ndarray, cache: KVCache | None, new: int
    ) -> tuple[Array, KVCache, int]:
        """Last-token logits, the cache with room for `new` more tokens, and how many tokens came from `cache`."""
        start = 0 if cache is None else shared_prefix(self._model.config, prompts, sizes, cache)
        rows = bucket_length(int(sizes.max()) - start)
        chunk = min(self._chunk or rows, rows)
        rows = -(-rows // chunk) * chunk
        capacity = start + rows + new
        if cache is None or cache.lengths.shape != sizes.shape:
            cache = self._model.init_cache(len(sizes), capacity)
        elif cache.capacity < capacity:
            cache = cache.grown(bucket_length(capacity))
        logits, cache = self._run(prompts, sizes, cache, start, rows, chunk)
        return logits, cache, start * len(sizes)

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
        whole = start == 0 and chunk == rows
        logits: Array | None = None
        for first in range(start, start + rows, chunk):
            result = self._model.prefill(
                jnp.asarray(padded[:, first : first + chunk]),
                jnp.asarray(sizes),
                cache,
                # Traced, also where it is 0: all parts run the same program.
                start=None if whole else jnp.asarray(first, jnp.int32),
                rope_lengths=jnp.asarray(sizes),
                implementation=self._implementation,
                return_info=self._return_info,
            )
            here, cache = result[:2]
            if self._return_info:
                self.info.append(result[2])
            # A sequence's last token may lie in an earlier part.
            logits = here if logits is None else _newer(sizes > first, here, logits)
            if self._progress is not None:
                jax.block_until_ready(here)
                self._progress(min(first + chunk, int(sizes.max())), int(sizes.max()))
            if first + chunk >= sizes.max():
                break
        assert logits is not None
        return logits, cache


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


@jax.jit
def _newer(is_here: Array, here: Array, before: Array) -> Array:
    return jnp.where(is_here[:, None], here, before)
