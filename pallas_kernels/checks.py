"""Argument checks of the public attention functions: trace-time errors that name the argument and the shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sizes import QUERY_TILE


def check_qkv(q: Array, k: Array, v: Array) -> None:
    """Raises TypeError for dtypes and ValueError for shapes that are no q [b, t, n, h], k and v [b, s, k, h]."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have four axes [batch, positions, heads, head_dim]; got {shapes}")
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
        raise ValueError(f"query heads must be a multiple of KV heads; got {shapes}")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"q has more positions than k; pass the whole cache as k and v; got {shapes}")


def check_lengths(lengths: Int[Array, " b"] | None, batch: int) -> None:
    """Raises unless lengths is None or an integer array [batch]."""
    if lengths is None:
        return
    if not jnp.issubdtype(jnp.asarray(lengths).dtype, jnp.integer):
        raise TypeError(f"lengths must be integers, got {jnp.asarray(lengths).dtype}")
    if jnp.shape(lengths) != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), one for each sequence; got {jnp.shape(lengths)}")


def check_q_offset(q_offset: int | Int[Array, ""], q_len: int, kv_len: int) -> Int[Array, ""]:
    """The offset as an int32 scalar. A Python int must be a multiple of 128 that leaves the queries inside the keys; an
    array's value is unknown here and is rounded down to a multiple of 128."""
    if isinstance(q_offset, int):
        if q_offset % QUERY_TILE or q_offset < 0:
            raise ValueError(f"q_offset must be a multiple of {QUERY_TILE} and >= 0, got {q_offset}")
        if q_offset + q_len > kv_len:
            raise ValueError(f"q_offset {q_offset} + {q_len} query positions exceed the {kv_len} positions of k and v")
    q_offset = jnp.asarray(q_offset)
    if q_offset.shape or not jnp.issubdtype(q_offset.dtype, jnp.integer):
        raise ValueError(f"q_offset must be an integer scalar, got {q_offset.dtype} {q_offset.shape}")
    return q_offset.astype(jnp.int32) // QUERY_TILE * QUERY_TILE


def check_scale(scale: float | None, q: Float[Array, "b t n h"]) -> float:
    """The static softmax scale, by default 1/sqrt(head_dim)."""
    if scale is None:
        return q.shape[-1] ** -0.5
    if isinstance(scale, jax.Array) or not 0 < float(scale) < float("inf"):
        raise ValueError(f"scale must be a positive Python number (it is static), got {scale!r}")
    return float(scale)
