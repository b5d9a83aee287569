"""What is static about one launch of the Hopper kernel, its arrays, and who computes which query tile."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import axes
from pallas_kernels.hopper.config import KernelConfig, Rounds
from pallas_kernels.launches import Refs, item_at


@dataclasses.dataclass(frozen=True)
class Launch:
    """Everything static about one launch.

    - `aligned`: every key tile starts at a multiple of 64 keys, so whole rows are copied in one piece.
    - `emulate`: jnp.dot instead of wgmma, for the interpreter.
    """

    config: KernelConfig
    rounds: Rounds
    heads: int
    kv_heads: int
    query_tiles: int
    work: int  # query tiles of all heads and sequences
    head_dim: int
    scale: float
    dtype: Any
    aligned: bool
    emulate: bool

    @property
    def part_width(self) -> int:
        """Elements of a row that one copy takes: all of them, or where tiles start anywhere one swizzle width."""
        if self.aligned:
            return self.head_dim
        return 64 if self.head_dim % 64 == 0 else 32

    @property
    def parts(self) -> int:
        """Copies that one row takes."""
        return self.head_dim // self.part_width

    @property
    def two_views(self) -> bool:
        """Whether K and V are copied into another view of the shared memory than wgmma reads."""
        return not (self.aligned or self.emulate)


def share_of(launch: Launch) -> jax.Array:
    """Number of query tiles that this thread block takes."""
    first, chain = launch.rounds.of(lax.axis_index(axes.BLOCK))
    left = launch.work - first
    return jnp.clip(lax.div(left + (launch.rounds.lanes - 1), jnp.int32(launch.rounds.lanes)), 0, chain)


def item_of(launch: Launch, refs: Refs, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(head of all sequences, query tile) of this thread block's `turn`-th item."""
    index = launch.rounds.of(lax.axis_index(axes.BLOCK))[0] + turn * launch.rounds.lanes
    return item_at(refs, launch.query_tiles, index)


def split_head(launch: Launch, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sequence, query head, KV head)."""
    head = lax.rem(z, jnp.int32(launch.heads))
    return lax.div(z, jnp.int32(launch.heads)), head, lax.div(head, jnp.int32(launch.heads // launch.kv_heads))
