"""Queries, keys and values of FP8 products, scaled and rotated on the way to their place in all rows' arrays."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn

from minference_jax.models import fp8
from minference_jax.models.chunks import Unplaced, put_heads
from minference_jax.models.config import LlamaConfig
from minference_jax.models.rope import Turns, apply_rope
from pallas_kernels.rows.place import Place, placed_rows, unsupported_reason
from pallas_kernels.tracing import on_gpus, vary_alike


def only_rotated(config: LlamaConfig, turns: Turns) -> bool:
    """Whether nothing but RoPE stands between products and their places: of whole heads, in halves."""
    traits = config.traits
    between = traits.qkv_bias or traits.qk_norm or traits.wide_qk_norm or traits.neighbours
    return not between and turns.queries is None and config.rotary_dim == config.head_dim


def rotated_product(
    rows: fp8.Rows,
    weight: Float8e4m3fn[Array, "n h d"],
    channel_scale: Float[Array, "n h"],
    turns: Turns | None,
) -> Unplaced:
    """`fp8.product`, and RoPE of it unless `turns` is None: the same numbers, on GPUs put in place by a kernel."""
    scales, shape = (rows.scale, channel_scale), (*rows.scale.shape, *channel_scale.shape)
    turn = None if turns is None else (turns.cos, turns.sin)
    # Without a barrier XLA makes one product of several, and copies the parts for the kernels.
    numbers, own = jax.lax.optimization_barrier((rows.numbers, weight))
    y = fp8.unscaled(rows._replace(numbers=numbers), own).reshape(*rows.scale.shape, -1)

    def chain(y: Array, row_scale: Array, channel_scale: Array, turn: tuple[Array, Array] | None) -> Array:
        y = y.reshape(-1, y.shape[-1])
        x = fp8.rescaled(y, row_scale.reshape(-1), channel_scale.reshape(-1), rows.dtype).reshape(shape)
        return x if turn is None else apply_rope(x, *turn)

    def value() -> Array:
        return chain(fp8.unscaled(rows, weight), *scales, turn)

    def place(into: Array, at: Place, heads: int) -> Array:
        def by_chain(into: Array, at: Place, *product: Any) -> Array:
            return put_heads(into, chain(*product), at, heads)

        served = unsupported_reason(y, into, heads) is None
        run = on_gpus(partial(placed_rows, heads=heads), by_chain) if served else by_chain
        return run(vary_alike(into, y, scales, turn), Place(*map(jnp.int32, at)), y, *scales, turn)

    return Unplaced(shape, rows.dtype, place, value)
