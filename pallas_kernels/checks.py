"""Argument checks of the public attention functions: trace-time errors that name the argument and the shapes."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.sizes import QUERY_TILE

DTYPES = ("float32", "bfloat16", "float16")
LEAST_HEADS = 129
"""More heads than any model has: so many, of fewer keys, are positions in the wrong place."""


SWAP = (
    "arrays are [batch, positions, heads, head_dim]; if these are [batch, heads, positions, head_dim], "
    "swap their axes 1 and 2"
)


def check_qkv(q: Array, k: Array, v: Array) -> None:
    """Raises TypeError for dtypes and ValueError for shapes that are no q [b, t, n, h], k and v [b, s, k, h]."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if jnp.dtype(x.dtype).name not in DTYPES:
            raise TypeError(f"{name} must be {', '.join(DTYPES)}, got {x.dtype}")
        if not all(isinstance(size, int) for size in x.shape):
            raise ValueError(
                f"{name} has symbolic axes, {x.shape}: tiles are counted while the program is traced, so batch and "
                "length must be numbers; export one program for each padded length"
            )
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have four axes [batch, positions, heads, head_dim]; got {shapes}")
    if k.shape[1] < LEAST_HEADS <= q.shape[2] and q.shape[1] < q.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads of {q.shape[1]} positions: {SWAP}; got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape; got {shapes}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have the same batch size; got {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have the same head_dim; got {shapes}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"no axis may be empty; got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of KV heads; got {shapes}{_if_swapped(q, k)}")
    if q.shape[1] > k.shape[1]:
        raise ValueError(
            f"q has more positions than k; pass the whole cache as k and v; got {shapes}{_if_swapped(q, k)}"
        )


def _if_swapped(q: Array, k: Array) -> str:
    """What to add to an error where [batch, heads, positions, head_dim] would be a likely reading, and would do."""
    heads, positions, kv_heads, keys = *q.shape[1:3], *k.shape[1:3]
    fits = heads % kv_heads == 0 and positions <= keys
    return f"; {SWAP}" if fits and heads < LEAST_HEADS and heads < positions else ""


def check_lengths(lengths: Any, batch: int, kv_len: int) -> Int[Array, " b"] | None:
    """The lengths as int32 [batch], clamped to [0, kv_len]; None stays None.

    Raises TypeError unless they are integers (an array, list or tuple), ValueError for another shape.
    """
    return None if lengths is None else clamped(integer_lengths(lengths, batch), 0, kv_len)


def integer_lengths(lengths: Any, batch: int) -> Any:
    """The lengths as an array of integers [batch], of any width and not clamped; raises as `check_lengths`."""
    if not isinstance(lengths, jax.Array):
        lengths = np.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), one for each sequence; got {lengths.shape}")
    return lengths


def clamped(x: Any, low: int, high: int) -> Array:
    """An integer array of any width as int32 within [low, high]: clamped before it is narrowed."""
    if not isinstance(x, jax.Array):  # JAX would cut off the upper half of 64 bits
        return jnp.asarray(
            np.clip(np.asarray(x).astype(np.int64 if x.dtype != np.uint64 else x.dtype), low, high), jnp.int32
        )
    most = jnp.iinfo(x.dtype)
    x = jnp.clip(x, jnp.asarray(max(low, int(most.min)), x.dtype), jnp.asarray(min(high, int(most.max)), x.dtype))
    return x.astype(jnp.int32)


def check_q_offset(q_offset: int | Int[Array, ""], q_len: int, kv_len: int) -> Int[Array, ""]:
    """The offset as an int32 scalar. A number must be a multiple of 128 that leaves the queries inside the keys; an
    array's value is unknown here and is clamped to [0, kv_len], then rounded down to a multiple of 128."""
    if not isinstance(q_offset, jax.Array) and np.ndim(q_offset) == 0 and np.asarray(q_offset).dtype.kind in "iu":
        q_offset = int(q_offset)
        if q_offset % QUERY_TILE or q_offset < 0:
            raise ValueError(f"q_offset must be a multiple of {QUERY_TILE} and >= 0, got {q_offset}")
        if q_offset + q_len > kv_len:
            raise ValueError(f"q_offset {q_offset} + {q_len} query positions exceed the {kv_len} positions of k and v")
        return jnp.asarray(q_offset, jnp.int32)
    if not isinstance(q_offset, jax.Array):
        raise TypeError(f"q_offset must be an integer scalar, got {q_offset!r}")
    if q_offset.shape or not jnp.issubdtype(q_offset.dtype, jnp.integer):
        raise ValueError(f"q_offset must be an integer scalar, got {q_offset.dtype} {q_offset.shape}")
    return clamped(q_offset, 0, kv_len) // QUERY_TILE * QUERY_TILE


def check_scale(scale: float | None, q: Float[Array, "*lead h"]) -> float:
    """The static softmax scale, by default 1/sqrt(head_dim)."""
    if scale is None:
        return q.shape[-1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not 0 < float(scale) < float("inf"):
        raise ValueError(f"scale must be a positive Python number (it is static), got {scale!r}")
    return float(scale)


def check_whole(name: str, value: Any, least: int) -> int:
    """A whole number that is known while the program is traced, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return int(value)


def check_positions(name: str, x: Array, batch: int, heads: int, axes: int) -> None:
    """Raises unless `x` is an integer array of so many axes that begin with [batch, heads]."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer array, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != axes or x.shape[:2] != (batch, heads):
        raise ValueError(f"{name} has shape {x.shape}; expected {axes} axes that begin with [{batch}, {heads}]")
