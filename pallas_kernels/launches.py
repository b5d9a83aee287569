"""What launches of the attention kernels have in common: their arrays, how rows lie in shared memory, and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.plan import kv_limit
from pallas_kernels.tracing import under_own_settings
from pallas_kernels.xla.backward import attention_backward


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in device memory. All from `bands` on but `bias` and `out` may be None."""

    q: Any
    k: Any
    v: Any
    work: Any
    bands: Any
    bias: Any
    blocks: Any
    keys: Any
    values: Any
    last_values: Any
    order: Any
    out: Any
    lse: Any


def item_at(refs: Refs, query_tiles: int, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(head of all sequences, query tile) of the `index`-th query tile to take: see `KernelTables.order`."""
    if refs.order is not None:
        index = refs.order[index]
    z = lax.div(index, jnp.int32(query_tiles))
    return z, query_tiles - 1 - lax.rem(index, jnp.int32(query_tiles))


def swizzle_of(head_dim: int) -> int:
    """Bytes of one swizzled row: the widest that divides a row of head_dim 16-bit elements."""
    return 128 if head_dim % 64 == 0 else 64


def tile_transforms(head_dim: int) -> tuple[Any, Any]:
    """What lays rows out in shared memory as tensor cores want them: without bank conflicts."""
    swizzle = swizzle_of(head_dim)
    tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def differentiable(attention: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel's attention, with the backward pass of `xla.backward.attention_backward` over the same plan.

    `attention(q, k, v, plan, lengths, q_offset, scale, return_lse, config, interpret)` returns the output and the
    log-sum-exp or None; arguments from `scale` on are static.
    """
    run: Any = partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))(attention)

    @under_own_settings
    def forward(q, k, v, plan, lengths, q_offset, scale, return_lse, config, interpret):
        out, lse = run(q, k, v, plan, lengths, q_offset, scale, True, config, interpret)
        return (out, lse if return_lse else None), (q, k, v, plan, lengths, q_offset, out, lse)

    @under_own_settings
    def backward(
        scale: float, return_lse: bool, config: Any, interpret: Any, saved: Any, cotangents: Any
    ) -> tuple[Any, ...]:
        q, k, v, plan, lengths, q_offset, out, lse = saved
        d_out, d_lse = cotangents
        d_lse = d_lse if return_lse else jnp.zeros_like(lse)
        limit = kv_limit(lengths, q.shape[0], k.shape[1])
        d_q, d_k, d_v = attention_backward(q, k, v, plan, limit, q_offset, out, lse, d_out, d_lse, scale=scale)
        return d_q, d_k, d_v, None, None, None

    run.defvjp(forward, backward)
    return run
