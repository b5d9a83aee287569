"""What callers of `generate` may pass: checked, and brought into one form, before anything runs."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32

from minference_jax.models.config import LlamaConfig
from minference_jax.planning.buckets import QUERY_TILE
from pallas_kernels.checks import check_whole


def check_prompts(
    tokens: Any, lengths: Any, vocab_size: int
) -> tuple[Int32[np.ndarray, "b t"], Int32[np.ndarray, " b"]]:
    """Prompts as int32 `[b, t]`, padded on the right with zeros, and their lengths.

    `tokens`: an array, a list of lists of any lengths, or a mapping with "input_ids" and perhaps "attention_mask".
    Raises `ValueError` or `TypeError` for any other form, an empty prompt, and an id outside the vocabulary.
    """
    if isinstance(tokens, Mapping) or hasattr(tokens, "input_ids"):  # a BatchEncoding is no Mapping in every version
        mask = tokens.get("attention_mask") if hasattr(tokens, "get") else None
        tokens = tokens["input_ids"]
        if mask is not None and lengths is None:
            lengths = _lengths_of_mask(mask)
    rows = _unequal(tokens)
    if rows is not None:
        if lengths is not None:
            raise ValueError("tokens are lists of unequal length: lengths must be None")
        lengths = np.array([len(row) for row in rows])
        tokens = np.zeros((len(rows), max(1, lengths.max())), np.int64)
        for place, row in zip(tokens, rows, strict=True):
            place[: len(row)] = row
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(
            f"tokens must have shape [batch, tokens] without empty axes, got {tokens.shape}; one prompt is [ids], and "
            "prompts of unequal length are lists, or padded on the right, with lengths"
        )
    sizes = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
    if sizes.shape != (len(tokens),):
        raise ValueError(f"lengths must have shape ({len(tokens)},), one for each row of tokens, got {sizes.shape}")
    for name, array in (("tokens", tokens), ("lengths", sizes)):
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{name} must be integers, got {array.dtype}")
    if sizes.min() < 1 or sizes.max() > tokens.shape[1]:
        raise ValueError(f"lengths must lie between 1 and {tokens.shape[1]}, got {sizes.tolist()}")
    valid = np.arange(tokens.shape[1]) < sizes[:, None]
    wrong = valid & ((tokens < 0) | (tokens >= vocab_size))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"tokens hold {wrong.sum()} ids outside the vocabulary of {vocab_size}: tokens[{row}, {column}] is "
            f"{tokens[row, column]} (a tokenizer of another model, or tokens added without resizing the embedding?)"
        )
    # What padding holds is never read, but must not wrap.
    return np.where(valid, tokens, 0).astype(np.int32), sizes.astype(np.int32)


def _unequal(tokens: Any) -> list[list[int]] | None:
    """The prompts, if they are a list of lists (or arrays) of different lengths."""
    if not isinstance(tokens, list | tuple) or not all(
        isinstance(row, Sequence | np.ndarray | Array) for row in tokens
    ):
        return None
    rows = [np.asarray(row) for row in tokens]
    if any(row.ndim != 1 for row in rows) or len({len(row) for row in rows}) < 2:
        return None
    for index, row in enumerate(rows):
        if len(row) and not np.issubdtype(row.dtype, np.integer):
            raise TypeError(f"tokens must be integers, got {row.dtype} in tokens[{index}]")
        if not len(row):
            raise ValueError(f"tokens[{index}] is an empty prompt")
    return [row.tolist() for row in rows]


def _lengths_of_mask(mask: Any) -> Int32[np.ndarray, " b"]:
    mask = np.asarray(mask).astype(bool)
    lengths = mask.sum(axis=-1)
    if mask.ndim != 2 or not np.array_equal(mask, np.arange(mask.shape[1]) < lengths[:, None]):
        raise ValueError("attention_mask must be [batch, tokens] with its zeros at the end: pad on the right")
    return lengths.astype(np.int32)


def check_numbers(max_new_tokens: int, temperature: float, top_p: float, prefill_chunk: int | None) -> None:
    """Raises `ValueError` for a number that is out of range, `TypeError` for what is no such number."""
    if check_whole("max_new_tokens", max_new_tokens, 0) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if prefill_chunk is not None:
        whole = check_whole("prefill_chunk", prefill_chunk, 0)
        if whole == 0 or whole % QUERY_TILE:
            raise ValueError(f"prefill_chunk must be a positive multiple of {QUERY_TILE}, got {whole}")


def check_context(config: LlamaConfig, prompt: int, new: int, strict: bool) -> None:
    """Warns, or raises `ValueError` if `strict`, where prompt and reply are longer than the model's context."""
    limit = config.context_length
    if limit is None or prompt + new <= limit:
        return
    trained = config.rope.original_max_position_embeddings or config.max_position_embeddings
    factor = math.ceil((prompt + new) / trained)
    scaling = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": trained}
    message = (
        f"a prompt of {prompt:,} tokens and {new:,} new ones exceed the model's context of {limit} tokens; its answers "
        f"may be nonsense. Shorten the prompt, or load the model with rope_scaling={scaling}"
    )
    if strict:
        raise ValueError(message)
    warnings.warn(message, UserWarning, stacklevel=3)


def token_ids(name: str, ids: Any) -> tuple[int, ...]:
    """One id, or several, as a tuple."""
    many = np.asarray(ids if not isinstance(ids, set | frozenset) else sorted(ids))
    if many.size and not np.issubdtype(many.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {ids!r}")
    return tuple(int(x) for x in many.reshape(-1))


def padding_id(config: LlamaConfig, given: Any, eos: tuple[int, ...]) -> int:
    """The id that follows a finished sequence: the one given, the config's, the first that ends a sequence, or 0."""
    if given is not None and (isinstance(given, bool) or not isinstance(given, int | np.integer)):
        raise TypeError(f"pad_token_id must be an integer, got {given!r}")
    known = [x for x in (given, config.pad_token_id, *eos) if x is not None and x >= 0]  # -1 means none
    return int(known[0]) if known else 0


def random_key(key: Any) -> Array:
    """A key of `jax.random`; a whole number is its seed."""
    if key is None or (isinstance(key, int | np.integer) and not isinstance(key, bool)):
        seed = int(key or 0)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"key must be a seed of at most 64 bits, got {seed}")
        return jax.random.key(seed)
    if isinstance(key, Array):
        try:
            jax.random.key_data(key)
            return key
        except TypeError:
            pass
    raise TypeError(f"key must be a seed or a key of jax.random, got {key!r}")
