"""Generation: a bucketed, jitted prefill, then decoding steps in one jitted loop.

Prompts are padded up to a bucket and the cache is as long as that bucket plus the bucket of `max_new_tokens`, so one
prefill program and one decoding program serve every prompt of the bucket; drawing tokens has a decoding program of its
own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minference_jax.models import forward, programs
from minference_jax.models.cache import KVCache
from minference_jax.models.config import LlamaConfig
from minference_jax.models.llama import Llama
from minference_jax.models.requests import (
    check_context,
    check_numbers,
    check_prompts,
    padding_id,
    random_key,
    token_ids,
)
from minference_jax.models.sampling import next_token
from minference_jax.parallel.exchange import Exchange
from minference_jax.planning.buckets import bucket_length
from minference_jax.planning.memory import advise
from minference_jax.text.prompts import PromptRunner, steps_before_new_rope
from pallas_kernels.tracing import under_own_settings

STEPS = 64
"""Decoding steps in one call of the jitted loop, and the width of its output."""
STREAM_STEPS = 4
"""Steps between two calls of `stream`. The loop's limit is traced, so this compiles nothing new."""


@dataclass(frozen=True)
class GenerationStats:
    """What a call of `generate` did. Seconds are wall time up to finished results; with `compiled`, they include
    compilation, so measure a second call.

    - `prompt_tokens`: in all sequences; `cached_tokens` of them came from the cache that was passed in.
    - `generated_tokens`: in all sequences, EOS included. The first of each sequence comes from the prefill.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    decode_steps: int
    prefill_seconds: float
    decode_seconds: float
    compiled: bool

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens, padding and cached ones not counted, per second of prefill."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        """Decoding steps per second: tokens per second of one sequence."""
        return self.decode_steps / max(self.decode_seconds, 1e-9)


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    - `tokens`: int32 `[b, max_new_tokens]` on the host; what follows a sequence's EOS is the padding token.
    - `lengths`: int32 `[b]`, tokens generated, EOS included.
    - `cache`: pass it to the next `generate` with the whole conversation, and only what is new is processed.
    - `info`: with `return_info`, the `AttentionInfo` of each prefill call (None where attention was dense).
    """

    tokens: Int[np.ndarray, "b new"]
    lengths: Int[np.ndarray, " b"]
    cache: KVCache
    stats: GenerationStats
    info: tuple[Any, ...] = ()

    def sequences(self) -> list[list[int]]:
        """The generated tokens of each sequence, without padding."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


def generate(
    model: Llama,
    tokens: Any,
    lengths: Any = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Array | int | None = None,
    eos_token_ids: Sequence[int] | int | None = None,
    pad_token_id: int | None = None,
    cache: KVCache | None = None,
    cache_dtype: str | None = None,
    offload: bool = False,
    prefill_chunk: int | None = None,
    implementation: str | None = None,
    stream: Callable[[list[list[int]]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    return_info: bool = False,
    strict: bool = False,
) -> Generation:
    """Continues each prompt by up to `max_new_tokens` tokens, or to its end-of-sequence token.

    **Arguments:**

    - `tokens`: integers `[b, t]`, padded on the right, and their `lengths` `[b]`, None for no padding; or a list of
      prompts of any lengths (`[ids, ids]`); or what a transformers tokenizer returns, with its `attention_mask`.
    - `temperature`: 0 is greedy. `top_p`: in (0, 1]. `key`: of `jax.random`, or a seed; default 0.
    - `eos_token_ids`, `pad_token_id`: default to the config's; an empty tuple generates on to the limit.
    - `strict`: a prompt and reply that exceed the model's context are an error; else a warning.
    - `cache`: of an earlier `Generation`, for a follow-up turn. `tokens` are the whole conversation again; the
      longest prefix that the cache shares with them, over all sequences and rounded down to a multiple of 128, is
      not processed again. The cache is given up: its buffers are donated.
    - `cache_dtype`: of a new cache: None for the model's, "fp8" or "int8" for half the memory. `offload`: return the
      cache in the host's memory, so that a conversation that waits holds none of the device's; the next turn brings it
      back.
    - `prefill_chunk`: process prompts in parts of so many tokens, a multiple of 128; less memory, and progress that
      can be seen. None: at once. Sparse heads estimate their index anew for each part.
    - `stream`: called with each sequence's new tokens every few steps. `progress`: called with prompt positions done
      and their total, during prefill. `implementation`: of attention.

    Raises `ValueError` for malformed arguments, empty prompts and ids outside the vocabulary, and
    `OutOfDeviceMemoryError`, with what would fit, where the device's memory does not suffice.
    """
    prompts, sizes = check_prompts(tokens, lengths, model.config.vocab_size)
    check_numbers(max_new_tokens, temperature, top_p, prefill_chunk)
    check_context(model.config, int(sizes.max()), max_new_tokens, strict)
    eos = model.config.eos_token_ids if eos_token_ids is None else token_ids("eos_token_ids", eos_token_ids)
    pad = padding_id(model.config, pad_token_id, eos)
    choose = {
        "key": random_key(key),
        "temperature": None if temperature == 0 else np.float32(temperature),
        "top_p": np.float32(top_p),
        "eos": np.asarray(eos or (-1,), np.int32),
        "pad": np.int32(pad),
    }
    choose = {name: model.exchange.place(model.config, value) for name, value in choose.items()}
    programs = _programs()

    started = time.perf_counter()
    run = PromptRunner(model, prefill_chunk, implementation, return_info, progress, cache_dtype)
    rows, room_for = bucket_length(prompts.shape[1]), bucket_length(max_new_tokens)
    with advise(
        model.config,
        tokens=rows + room_for,
        batch=len(sizes),
        chunk=prefill_chunk,
        dtype=model.dtype.name,
        cache=cache_dtype or "model",
        fp8_projections=model.fp8_projections,
        patterns=model.patterns_at(prefill_chunk or rows, rows + room_for),
        mesh=model.mesh,
    ):
        logits, filled, cached_tokens = run(prompts, sizes, cache, room_for)
        token, done = _first_token(logits, filled.lengths, np.zeros(len(sizes), bool), **choose)
        pieces = [np.asarray(token)[:, None]]
    prefill_seconds = time.perf_counter() - started

    started = time.perf_counter()
    finished = np.asarray(done)
    counts = np.ones(len(sizes), np.int32)
    if stream is not None:
        stream(pieces[0].tolist())
    steps = 0
    while steps < max_new_tokens - 1 and not finished.all():
        limit = min(max_new_tokens - 1 - steps, STEPS if stream is None else STREAM_STEPS)
        room = steps_before_new_rope(model.config, filled, finished)
        if room == 0:
            logits, filled = run.again(filled, np.asarray(token), finished)
            token, done = _first_token(logits, filled.lengths, finished, **choose)
            new, taken = np.asarray(token)[:, None], 1
        else:
            token, done, filled, out, taken = _decode_steps(
                model.config,
                model.exchange,
                model.params(),
                token,
                done,
                filled,
                np.int32(limit if room is None else min(limit, room)),
                **choose,
            )
            taken = int(taken)
            new = np.asarray(out)[:, :taken]
        steps += taken
        pieces.append(new)
        valid = _valid_counts(new, finished, eos)
        counts += valid
        finished = np.asarray(done)
        if stream is not None:
            stream([row[:n].tolist() for row, n in zip(new, valid, strict=True)])
    decode_seconds = time.perf_counter() - started

    result = np.full((len(sizes), max_new_tokens), pad, np.int32)
    result[:, : steps + 1] = np.concatenate(pieces, axis=1)
    stats = GenerationStats(
        prompt_tokens=int(sizes.sum()),
        cached_tokens=cached_tokens,
        generated_tokens=int(counts.sum()),
        decode_steps=steps,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        compiled=_programs() > programs,
    )
    return Generation(result, counts, filled.on_host() if offload else filled, stats, tuple(run.info))


def _valid_counts(new: np.ndarray, finished: np.ndarray, eos: tuple[int, ...]) -> np.ndarray:
    """How many of `new` [b, steps] belong to each sequence: all up to its first EOS, none once it is finished."""
    ends = np.isin(new, eos)
    first = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, new.shape[1])
    return np.where(finished, 0, first).astype(np.int32)


def _programs() -> int:
    """How many programs this process has compiled for the functions below and for prefill."""
    functions: tuple[Any, ...] = (_first_token, _decode_steps)
    return programs.PREFILL.compiled() + sum(function._cache_size() for function in functions)


@jax.jit
@under_own_settings
def _first_token(
    logits: Array,
    positions: Array,
    finished: Array,
    *,
    key: Array,
    temperature: Array | None,
    top_p: Array,
    eos: Array,
    pad: Array,
) -> tuple[Array, Array]:
    """The token that follows a prefill, and which sequences have reached their end."""
    token = jnp.where(finished, pad, next_token(logits, key, positions, temperature, top_p))
    return token, finished | jnp.isin(token, eos)


@partial(jax.jit, static_argnames=("config", "exchange"), donate_argnames="cache")
@under_own_settings
def _decode_steps(
    config: LlamaConfig,
    exchange: Exchange,
    params: forward.Params,
    token: Array,
    finished: Array,
    cache: KVCache,
    limit: Array,
    *,
    key: Array,
    temperature: Array | None,
    top_p: Array,
    eos: Array,
    pad: Array,
) -> tuple[Array, Array, KVCache, Array, Array]:
    """Up to `limit` steps, fewer if all sequences end: last tokens, ends, cache, tokens `[b, STEPS]` and steps done."""

    def unfinished(state: tuple) -> Array:
        step, _, finished, _, _ = state
        return (step < limit) & ~jnp.all(finished)

    def advance(state: tuple) -> tuple:
        step, token, finished, cache, out = state
        logits, cache = programs.decode_step(config, params, token, cache, ~finished, exchange)
        token = jnp.where(finished, pad, next_token(logits, key, cache.lengths, temperature, top_p))
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], step, axis=1)
        return step + 1, token, finished | jnp.isin(token, eos), cache, out

    out = jnp.full((token.shape[0], STEPS), pad, jnp.int32)
    state = (jnp.int32(0), token, finished, cache, out)
    steps, token, finished, cache, out = jax.lax.while_loop(unfinished, advance, state)
    return token, finished, cache, out, steps
