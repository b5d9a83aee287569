"""Rotary position embedding and its context extensions.

Pair j of a head (dimensions j and j + r/2 of the r rotated ones) turns by angle `position · f_j`. The kinds differ in
`f_j` only, besides a scale on cos and sin for yarn and longrope. With b_j = θ^(-2j/r) and factor F:

- default: b_j, and linear: b_j / F;
- dynamic (NTK-aware): b_j with θ grown to θ·(F·s/s₀ - F + 1)^(r/(r-2)) once the sequence length s exceeds s₀;
- llama3: b_j for short wavelengths, b_j / F for long ones, a linear blend between;
- yarn (arXiv 2309.00071): a blend of b_j and b_j / F, linear in j between two correction dimensions;
- longrope (arXiv 2402.13753): b_j / short_factor_j up to s₀ tokens, b_j / long_factor_j beyond.

The numbers follow transformers (`modeling_rope_utils.py`), down to float32 order of operations: at position 10⁵ one
unit in the last place of f_j already shows in the logits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from minference_jax.models.config import LlamaConfig, RopeConfig


def inverse_frequencies(config: LlamaConfig, sequence_lengths: Int32[Array, " b"]) -> Float[Array, "#b r"]:
    """float32 frequencies f_j in radians per token, one row per sequence, or a single row where lengths don't matter.

    `sequence_lengths` is the length each sequence has at this call, the new tokens included.
    """
    rope, dim = config.rope, config.rotary_dim
    if rope.kind == "dynamic":
        return _dynamic(rope, dim, sequence_lengths)
    if rope.kind == "longrope":
        short, long = (jnp.asarray(_scaled_by(rope, dim, f)) for f in (rope.short_factor, rope.long_factor))
        is_long = sequence_lengths > (rope.original_max_position_embeddings or 0)
        return jnp.where(is_long[:, None], long[None], short[None])
    frequencies = _base(rope.theta, dim)
    if rope.kind == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind == "yarn":
        frequencies = _yarn(rope, dim)
    return jnp.asarray(frequencies)[None]


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1 except for yarn and longrope, which sharpen attention for long contexts."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        if rope.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings or math.e))
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_mscale(rope.factor, rope.mscale) / _yarn_mscale(rope.factor, rope.mscale_all_dim)
    return _yarn_mscale(rope.factor, 1.0)


class LayerRope(NamedTuple):
    """What a layer rotates by: float32 frequencies, one row or one for each sequence, and a factor on cos and sin."""

    frequencies: Float[Array, "#b r"]
    factor: Float[Array, ""] | float


def layer_rope(config: LlamaConfig, sequence_lengths: Int32[Array, " b"], layer: int | Int32[Array, ""]) -> LayerRope:
    """The rotation of one layer (its number may be traced): the model's RoPE, its second one, or none.

    `sequence_lengths` as in `inverse_frequencies`.
    """
    main = LayerRope(inverse_frequencies(config, sequence_lengths), attention_factor(config.rope))
    names = [kind.rope for kind in config.layer_kinds]
    if set(names) <= {"main"}:
        return main
    kinds = [main, LayerRope(jnp.zeros_like(main.frequencies), 1.0)]
    if config.local_rope is not None:
        other = dataclasses.replace(config, rope=config.local_rope)
        local = LayerRope(inverse_frequencies(other, sequence_lengths), attention_factor(other.rope))
        kinds.append(local)
    place = jnp.asarray([("main", "none", "local").index(name) for name in names], jnp.int32)[layer]
    shape = jnp.broadcast_shapes(*(kind.frequencies.shape for kind in kinds))
    frequencies = jnp.stack([jnp.broadcast_to(kind.frequencies, shape) for kind in kinds])
    factors = jnp.asarray([kind.factor for kind in kinds], jnp.float32)
    return LayerRope(frequencies[place], factors[place])


class Turns(NamedTuple):
    """float32 cos and sin of every position's angles, and what queries are multiplied by (None: nothing)."""

    cos: Float[Array, "*rows r"]
    sin: Float[Array, "*rows r"]
    queries: Float[Array, "*rows"] | None = None


def turns(config: LlamaConfig, rope: LayerRope, positions: Int32[Array, "#b t"]) -> Turns:
    """The rotation of each position of a layer.

    Where a family scales its scores by other than 1/√head_dim, or its queries by their position, queries carry that
    factor, so that attention itself needs to know of neither.
    """
    angles = positions[:, :, None].astype(jnp.float32) * rope.frequencies[:, None, :]
    cos, sin = jnp.cos(angles) * rope.factor, jnp.sin(angles) * rope.factor
    traits = config.traits
    scale = 1.0 if traits.attention_scale is None else traits.attention_scale * config.head_dim**0.5
    if scale == 1 and not traits.query_growth:
        return Turns(cos, sin)
    trained = config.rope.original_max_position_embeddings or config.max_position_embeddings
    growth = traits.query_growth * jnp.log1p((positions // trained).astype(jnp.float32))
    return Turns(cos, sin, scale * (1 + growth))


def apply_rope(
    x: Float[Array, "b t n h"],
    cos: Float[Array, "#b t r"],
    sin: Float[Array, "#b t r"],
    scale: Float[Array, "#b t"] | None = None,
    neighbours: bool = False,
) -> Float[Array, "b t n h"]:
    """Rotates the first 2r dimensions of each head, in float32, and passes the others; the result has x's dtype.

    `scale` multiplies all dimensions, before the result is rounded. `neighbours`: pairs are dimensions 2j and 2j + 1,
    not j and j + r.
    """
    r = cos.shape[-1]
    rotated, rest = x[..., : 2 * r].astype(jnp.float32), x[..., 2 * r :]
    axis = -1 if neighbours else -2
    pairs = rotated.reshape(*x.shape[:-1], *((r, 2) if neighbours else (2, r)))
    cos, sin = (jnp.expand_dims(turn[:, :, None, :], axis) for turn in (cos, sin))
    sign = jnp.asarray([-1, 1], jnp.float32).reshape((2,) if neighbours else (2, 1))
    # One expression for both of a pair: as two that are joined, GPUs took 13.9 ms for 1M rows of 32 heads, and take 7.3
    # (an H200, jax 0.11.2, 8bb7bae, bfloat16, with an FP8 product's scales before it).
    turned = (pairs * cos + jnp.flip(pairs, axis) * (sign * sin)).reshape(rotated.shape)
    if scale is not None:
        turned = turned * scale[:, :, None, None]
        rest = (rest.astype(jnp.float32) * scale[:, :, None, None]).astype(x.dtype)
    turned = turned.astype(x.dtype)
    return turned if 2 * r == x.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


def _exponents(dim: int) -> np.ndarray:
    return np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)


def _base(theta: float, dim: int) -> np.ndarray:
    return np.float32(1) / np.float32(theta) ** _exponents(dim)


def _scaled_by(rope: RopeConfig, dim: int, factors: tuple[float, ...] | None) -> np.ndarray:
    return np.float32(1) / (np.asarray(factors, np.float32) * np.float32(rope.theta) ** _exponents(dim))


def _dynamic(rope: RopeConfig, dim: int, lengths: jax.Array) -> jax.Array:
    trained = rope.original_max_position_embeddings or 1
    lengths = jnp.maximum(lengths, trained).astype(jnp.float32)
    stretch = rope.factor * lengths / trained - (rope.factor - 1)
    theta = rope.theta * stretch ** (dim / (dim - 2))
    return 1.0 / theta[:, None] ** jnp.asarray(_exponents(dim))[None]


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    trained = rope.original_max_position_embeddings or 1
    low, high, factor = (np.float32(x) for x in (rope.low_freq_factor, rope.high_freq_factor, rope.factor))
    wavelengths = np.float32(2 * math.pi) / frequencies
    share = (np.float32(trained) / wavelengths - low) / (high - low)
    blended = (np.float32(1) - share) * frequencies / factor + share * frequencies
    is_long, is_short = wavelengths > trained / low, wavelengths < trained / high
    return np.where(is_long, frequencies / factor, np.where(is_short, frequencies, blended))


def _yarn(rope: RopeConfig, dim: int) -> np.ndarray:
    def correction_dim(rotations: float) -> float:
        trained = rope.original_max_position_embeddings or 1
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    powers = np.float32(rope.theta) ** _exponents(dim)
    extrapolated, interpolated = np.float32(1) / powers, np.float32(1) / (np.float32(rope.factor) * powers)
    keep = np.float32(1) - ramp
    return interpolated * (np.float32(1) - keep) + extrapolated * keep


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
