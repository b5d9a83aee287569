"""RMSNorm as checkpoints expect it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minference_jax.models.config import LlamaConfig


def rms_norm(
    x: Float[Array, "*rows d"], weight: Float[Array, " d"], eps: float, offset: float | None = None
) -> Float[Array, "*rows d"]:
    """x / √(mean(x²) + eps) in float32, rounded to x's dtype before the weight, as checkpoints expect.

    With an `offset`, times offset + weight in float32, and rounded after that, as Gemma's and gpt-oss's expect.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if offset is not None:
        return (y * (offset + weight.astype(jnp.float32))).astype(x.dtype)
    return weight * y.astype(x.dtype)


def norm(config: LlamaConfig, x: Float[Array, "*rows d"], weight: Float[Array, " d"]) -> Float[Array, "*rows d"]:
    """The model's RMSNorm."""
    return rms_norm(x, weight, config.rms_norm_eps, config.traits.norm_offset)


def rounded(x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """The same numbers, with their dtype's precision in each program: XLA leaves out roundings between float32 sums."""
    precision = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, precision.nexp, precision.nmant)
