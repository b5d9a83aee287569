"""Choosing the next token from logits: greedy, or temperature with nucleus (top-p) sampling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def next_token(
    logits: Float[Array, "b vocab"],
    key: Array,
    positions: Int32[Array, " b"],
    temperature: Float[Array, ""] | None,
    top_p: Float[Array, ""],
) -> Int32[Array, " b"]:
    """The most likely token where `temperature` is None, otherwise one drawn from softmax(logits / temperature).

    Drawing is restricted to the smallest set of most likely tokens whose probabilities reach `top_p` (all that tie
    with the last of them included, and one at least). Each row draws with a key of its own, made from its number and
    the token's position, so what it draws depends neither on the batch nor on how decoding is cut into calls.

    `temperature` and `top_p` are traced: other numbers compile nothing. A choice between the two ways on the device
    would make the host wait for every token.
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / jnp.maximum(temperature, 1e-6)
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
    keys = jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))(rows, positions)
    return jax.vmap(jax.random.categorical)(keys, keep_nucleus(scaled, top_p)).astype(jnp.int32)


def keep_nucleus(logits: Float[Array, "b vocab"], top_p: Float[Array, ""]) -> Float[Array, "b vocab"]:
    """Logits outside the smallest set of most likely tokens that holds probability `top_p` become minus infinity."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    count = jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1)
    least = jnp.take_along_axis(ordered, count - 1, axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)
