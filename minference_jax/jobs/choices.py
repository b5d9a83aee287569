"""A reply that is one of a few labels: how probable each of them is after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

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
    model: Llama, logits: Float[Array, "b vocab"], cache: KVCache, labels: Sequence[Sequence[Sequence[int]]]
) -> Float[np.ndarray, "b c"]:
    """log p of each label after each prompt, of the labels alone: the probabilities of a row sum to 1.

    Arguments and cost are those of `continuation_scores`.
    """
    return np.asarray(jax.nn.log_softmax(continuation_scores(model, logits, cache, labels)[0], axis=-1))


def continuation_scores(
    model: Llama,
    logits: Float[Array, "b vocab"],
    cache: KVCache,
    labels: Sequence[Sequence[Sequence[int]]],
    *,
    room: tuple[int, int] = (1, 1),
) -> tuple[Float[Array, "b c"], Bool[np.ndarray, "b c"]]:
    """log p of each continuation of each prompt, and whether greedy decoding would write it.

    **Arguments:**

    - `logits`, `cache`: what prefill of the prompts gave. The cache has room for the longest continuation, and stays as
      it is.
    - `labels`: token ids of the continuations of each row. A row with fewer than another has −inf at the end.
    - `room`: compile for at least so many continuations, and tokens of each: few programs then serve many shapes.

    Cost: a decoding step for each token of a continuation but its first.
    """
    most, width = max(map(len, labels)), max(len(label) for row in labels for label in row)
    most, width = max(most, room[0]), max(width, room[1])
    ids = np.zeros((len(labels), most, width), np.int32)
    sizes = np.zeros((len(labels), most), np.int32)
    for place, row in enumerate(labels):
        for number, label in enumerate(row):
            ids[place, number, : len(label)] = label
            sizes[place, number] = len(label)
    totals, greedy = _totals(model.config, model.params(), logits, cache, jnp.asarray(ids), jnp.asarray(sizes))
    return totals, np.asarray(greedy) & (sizes > 0)


@partial(jax.jit, static_argnames="config")
def _totals(
    config: LlamaConfig,
    params: forward.Params,
    logits: Array,
    cache: KVCache,
    labels: Int32[Array, "b c w"],
    sizes: Int32[Array, "b c"],
) -> tuple[Array, Array]:
    """log p of each label `[b, c]`, and whether all its tokens are the likeliest: of its first token by the prompt, of
    each other one by a decoding step."""
    firsts = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[:, :, 0], axis=-1)
    firsts = jnp.where(sizes > 0, firsts, -jnp.inf)
    likeliest = labels[:, :, 0] == jnp.argmax(logits, axis=-1)[:, None]
    if labels.shape[2] == 1:
        return firsts, likeliest

    def total(of_label: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        label, size, first, likeliest = of_label  # of every row: [b, w], [b], [b], [b]

        def step(carry: tuple[KVCache, Array, Array], place: Array) -> tuple[tuple[KVCache, Array, Array], None]:
            cache, sum_, greedy = carry
            after, cache = forward.decode(config, params, label[:, place - 1], cache)
            log_p = jnp.take_along_axis(jax.nn.log_softmax(after.astype(jnp.float32)), label[:, place, None], axis=-1)
            greedy &= (place >= size) | (jnp.argmax(after, axis=-1) == label[:, place])
            return (cache, sum_ + jnp.where(place < size, log_p[:, 0], 0), greedy), None

        places = jnp.arange(1, label.shape[1], dtype=jnp.int32)
        (_, sum_, greedy), _ = jax.lax.scan(step, (cache, first, likeliest), places)
        return sum_, greedy

    sums, greedy = jax.lax.map(total, (labels.swapaxes(0, 1), sizes.T, firsts.T, likeliest.T))
    return sums.T, greedy.T
