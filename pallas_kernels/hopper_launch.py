"""What is static about one launch of the Hopper kernel, its shared memory, and who computes which query tile."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper_config import COMPUTE_WARPGROUPS, ROWS, STEP_KEYS, KernelConfig


@dataclasses.dataclass(frozen=True)
class Launch:
    """Everything static about one launch. `emulate` replaces wgmma by jnp.dot, for the interpreter."""

    config: KernelConfig
    lanes: int  # thread blocks that take turns over neighbouring query tiles
    chain: int  # query tiles of one thread block
    heads: int
    kv_heads: int
    query_tiles: int
    work: int  # query tiles of all heads and sequences
    head_dim: int
    scale: float
    dtype: Any
    emulate: bool


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in device memory. `blocks`, `keys`, `values` and `lse` may be None."""

    q: Any
    k: Any
    v: Any
    work: Any
    bands: Any
    bias: Any
    blocks: Any
    keys: Any
    values: Any
    out: Any
    lse: Any


def scratch_types(launch: Launch, with_lse: bool) -> dict[str, Any]:
    """Shared memory and barriers of one thread block."""
    stages, h, dtype = launch.config.stages, launch.head_dim, launch.dtype
    swizzle = 128 if h % 64 == 0 else 64
    transforms = (
        plgpu.TilingTransform((8, swizzle // 2)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )

    def matrix(*shape: int):
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    types = {
        "q_smem": matrix(2 * COMPUTE_WARPGROUPS, ROWS, h),
        "k_smem": matrix(stages, STEP_KEYS, h),
        "v_smem": matrix(stages, STEP_KEYS, h),
        "q_full": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2),
        "q_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2),
        "k_full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE_WARPGROUPS),
    }
    if with_lse:
        types["lse_smem"] = plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS), jnp.float32)
    return types


def _first(launch: Launch) -> jax.Array:
    """This thread block's first query tile in the launch's order; the others follow `lanes` apart."""
    block, lanes = lax.axis_index("block"), jnp.int32(launch.lanes)
    return lax.div(block, lanes) * (launch.lanes * launch.chain) + lax.rem(block, lanes)


def share_of(launch: Launch) -> jax.Array:
    """Number of query tiles that this thread block takes."""
    left = launch.work - _first(launch)
    return jnp.clip(lax.div(left + (launch.lanes - 1), jnp.int32(launch.lanes)), 0, launch.chain)


def item_of(launch: Launch, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(head of all sequences, query tile) of this thread block's `turn`-th item: heads slow, late tiles first."""
    index = _first(launch) + turn * launch.lanes
    z = lax.div(index, jnp.int32(launch.query_tiles))
    return z, launch.query_tiles - 1 - lax.rem(index, jnp.int32(launch.query_tiles))


def split_head(launch: Launch, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sequence, query head, KV head)."""
    head = lax.rem(z, jnp.int32(launch.heads))
    return lax.div(z, jnp.int32(launch.heads)), head, lax.div(head, jnp.int32(launch.heads // launch.kv_heads))
