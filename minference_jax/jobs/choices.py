"""A reply that is one of a few labels: how probable each of them is after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from minference_jax.models import forward
from minference_jax.models.cache import KVCache
from minference_jax.models.config import LlamaConfig
from minference_jax.models.llama import Llama


def choice_ids(tokenizer: Any, choices: Sequence[str]) -> list[list[int]]:
    """Token ids of each label. Where one label begins another, all end with the token that ends a reply.

    Raises `ValueError` for fewer than two labels, labels that are equal or empty, and labels of the same ids.
    """
    if len(choices) < 2 or len(set(choices)) < len(choices) or not all(label.strip() for label in choices):
        raise ValueError(f"choices must be two or more labels that differ, got {list(choices)}")
    ids = [tokenizer.encode(label, add_special_tokens=False) for label in choices]
    if len({tuple(one) for one in ids}) < len(ids) or not all(ids):
        raise ValueError(f"choices must have tokens that differ, got {list(choices)}")
    if any(a is not b and b[: len(a)] == a for a in ids for b in ids):
        if not tokenizer.eos_token_ids:
            raise ValueError(f"one of the choices begins another, and the tokenizer has no end: {list(choices)}")
        ids = [[*one, tokenizer.eos_token_ids[0]] for one in ids]
    return ids


def choice_log_probabilities(
    model: Llama, logits: Float[Array, "b vocab"], cache: KVCache, labels: Sequence[Sequence[int]]
) -> Float[np.ndarray, "b c"]:
    """log p of each label after each prompt, of the labels alone: their probabilities sum to 1.

    **Arguments:** `logits`, `cache`: what prefill of the prompts gave. The cache has room for the longest label, and
    stays as it is.

    Cost: a decoding step for each token of a label but its first.
    """
    width = max(map(len, labels))
    ids = np.zeros((len(labels), width), np.int32)
    for row, label in zip(ids, labels, strict=True):
        row[: len(label)] = label
    sizes = np.asarray([len(label) for label in labels], np.int32)
    totals = _totals(model.config, model.params(), logits, cache, jnp.asarray(ids), jnp.asarray(sizes))
    return np.asarray(jax.nn.log_softmax(totals, axis=-1))


@partial(jax.jit, static_argnames="config")
def _totals(
    config: LlamaConfig,
    params: forward.Params,
    logits: Array,
    cache: KVCache,
    labels: Int32[Array, "c w"],
    sizes: Int32[Array, " c"],
) -> Array:
    """log p of each label `[b, c]`: of its first token by the prompt, of each other one by a decoding step."""
    first = jax.nn.log_softmax(logits.astype(jnp.float32))
    if labels.shape[1] == 1:
        return first[:, labels[:, 0]]

    def total(label_and_size: tuple[Array, Array]) -> Array:
        label, size = label_and_size

        def step(carry: tuple[KVCache, Array], place: Array) -> tuple[tuple[KVCache, Array], None]:
            cache, sum_ = carry
            token = jnp.broadcast_to(label[place - 1], sum_.shape)
            after, cache = forward.decode(config, params, token, cache)
            log_p = jax.nn.log_softmax(after.astype(jnp.float32))[:, label[place]]
            return (cache, sum_ + jnp.where(place < size, log_p, 0)), None

        places = jnp.arange(1, labels.shape[1], dtype=jnp.int32)
        (_, sum_), _ = jax.lax.scan(step, (cache, first[:, label[0]]), places)
        return sum_

    return jax.lax.map(total, (labels, sizes)).T
