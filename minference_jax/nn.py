"""Sparse attention as the `attention_fn` of `flax.nnx.MultiHeadAttention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from minference_jax.attention import Patterns, sparse_attention
from pallas_kernels.backends import Implementation


def attention_fn(pattern: Patterns, *, implementation: Implementation | None = None) -> Callable[..., Array]:
    """A function that Flax layers call for attention, causal and sparse by `pattern`.

    ```python
    layer = nnx.MultiHeadAttention(8, 512, decode=False, rngs=nnx.Rngs(0), attention_fn=attention_fn(AShape(64, 1024)))
    ```

    It is causal always, whatever a layer says with `is_causal` (whose default is False): the mask is the pattern's own.

    **Arguments:** `pattern`, `implementation`: as for `minference_jax.sparse_attention`.

    **Returns:** `attend(query, key, value, ...)` for arrays `[b, t, n, h]`. It raises ValueError for what it would
    have to leave out: a mask or bias, dropout, a precision, weights to be kept.
    """

    def attend(
        query: Float[Array, "b t n h"],
        key: Float[Array, "b s k h"],
        value: Float[Array, "b s k h"],
        bias: Any = None,
        mask: Any = None,
        *,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = True,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        promote_dtype: Callable[..., Any] | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> Float[Array, "b t n h"]:
        for name, value_of_it in (("mask", mask), ("bias", bias), ("module", module), ("precision", precision)):
            if value_of_it is not None:
                raise ValueError(f"sparse attention takes no {name}: it is causal, with the mask of its pattern")
        if dropout_rate and not deterministic:
            raise ValueError(f"sparse attention has no dropout, got dropout_rate {dropout_rate}")
        for name, value_of_it in others.items():
            if value_of_it is not None:
                raise ValueError(f"sparse attention takes no {name}")
        if promote_dtype is not None:
            query, key, value = promote_dtype((query, key, value), dtype=dtype)
        elif dtype is not None:
            query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
        return sparse_attention(query, key, value, pattern, implementation=implementation)

    return attend
