"""Sparse attention as the `attention_fn` of `flax.nnx.MultiHeadAttention`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from jaxtyping import Array

from minference_jax.attention import Patterns, sparse_attention
from pallas_kernels.backends import Implementation


def attention_fn(pattern: Patterns, *, implementation: Implementation | None = None) -> Callable[..., Array]:
    """A function that Flax layers call for attention, causal and sparse by `pattern`.

    ```python
    layer = nnx.MultiHeadAttention(8, 512, decode=False, rngs=nnx.Rngs(0), attention_fn=attention_fn(AShape(64, 1024)))
    ```

    It is causal always. A layer says `is_causal=False` where its caller says nothing, so that changes nothing.

    **Arguments:** `pattern`, `implementation`: as for `minference_jax.sparse_attention`.

    **Returns:** `attend(query, key, value, ...)` for arrays `[b, t, n, h]`. It raises ValueError for what it would
    have to leave out (`minference_jax.keywords`): a mask or bias, dropout, a precision, weights to be kept, keys of
    other positions than the queries'.
    """
    return partial(sparse_attention, pattern=pattern, implementation=implementation)
