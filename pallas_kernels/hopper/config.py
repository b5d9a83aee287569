"""Static tuning of the Hopper kernel, and the shared memory that each choice needs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import multiprocessors
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE

SHARED_MEMORY_LIMIT = 232_448
"""Bytes of dynamic shared memory that one thread block may use on compute capability 9.0."""

STEP_KEYS = 2 * KEY_TILE
"""Keys of one pipeline step: two independent key tiles, one 128-wide wgmma."""

COMPUTE_WARPGROUPS = 2
ROWS = QUERY_TILE // COMPUTE_WARPGROUPS
"""Query rows of one compute warpgroup: the M of one wgmma."""

POOL_REGISTERS = (COMPUTE_WARPGROUPS + 1) * 168
"""Registers per thread of all warpgroups together: what a thread block of 384 threads is launched with. A warpgroup
that asks for more waits for the others to give theirs up, for ever if there are not enough."""

HEAD_DIMS = (64, 96, 128)


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """How the Hopper kernel is laid out on a multiprocessor. The defaults are the fastest of those measured
    for most plans (notebooks/hopper-kernel.md has the others).

    - `stages`: pipeline steps in flight between the memory warpgroup and the compute warpgroups.
    - `chain`: query tiles that one thread block computes in turn; None means all of them in one round of thread blocks.
      Long chains let thread blocks drift apart, until neighbours no longer find each other's keys in the L2 cache. The
      last thread blocks get shorter ones, so that all multiprocessors end at nearly the same time.
    - `lanes`: thread blocks that take turns over neighbouring query tiles; None means one per multiprocessor.
    - `compute_registers`, `memory_registers`: registers per thread of the two kinds of warpgroup, with `overlap`.
    - `overlap`: both products of a warpgroup at a time, which takes registers that the warpgroup that loads gives up;
      False where the assembler does not let it.
    - `polynomial_tiles`: how many of 16 exponentials are computed as polynomials; None decides by head_dim.

    Raises ValueError for values that no kernel can be built from.
    """

    stages: int = 2
    chain: int | None = 4
    lanes: int | None = None
    compute_registers: int = 232
    memory_registers: int = 40
    overlap: bool = True
    polynomial_tiles: int | None = None

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2; got {self.stages}")
        if not 0 <= (self.polynomial_tiles or 0) <= 16:
            raise ValueError(f"polynomial_tiles must be in [0, 16]; got {self.polynomial_tiles}")
        for name in ("chain", "lanes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive; got {value}")
        for name in ("compute_registers", "memory_registers"):
            count = getattr(self, name)
            if count % 8 or not 24 <= count <= 240:
                raise ValueError(f"{name} must be a multiple of 8 in [24, 240]; got {count}")
        if COMPUTE_WARPGROUPS * self.compute_registers + self.memory_registers > POOL_REGISTERS:
            raise ValueError(
                f"compute_registers={self.compute_registers} and memory_registers={self.memory_registers} need more "
                f"than the {POOL_REGISTERS} registers that three warpgroups start with; the kernel would never start"
            )

    def shared_memory_bytes(self, head_dim: int) -> int:
        """Bytes of shared memory for 16-bit inputs: two Q buffers; K, V and bias stages; the LSE row and barriers."""
        queries = 2 * QUERY_TILE * head_dim * 2
        keys = 2 * self.stages * STEP_KEYS * head_dim * 2
        barriers = 8 * (5 * self.stages + 4)
        bias = 2 * self.stages * STEP_KEYS
        return queries + keys + bias + 4 * QUERY_TILE + barriers + 2_048  # 2 KiB: alignment of the swizzled buffers

    def fits(self, head_dim: int) -> bool:
        """Whether a multiprocessor has the shared memory for this configuration."""
        return self.shared_memory_bytes(head_dim) <= SHARED_MEMORY_LIMIT

    def polynomials(self, head_dim: int) -> int:
        """How many of 16 exponentials are polynomials: none where the matrix products take longer than all of them."""
        if self.polynomial_tiles is None:
            return 2 if head_dim <= 64 else 0
        return self.polynomial_tiles

    def rounds_for(self, work: int) -> Rounds:
        """Which thread block computes which of `work` query tiles."""
        lanes = min(work, self.lanes or multiprocessors())
        if self.chain is None:
            return Rounds(lanes, -(-work // lanes), 1, lanes)
        full = max(work // (lanes * self.chain) - 1, 0)
        left = work - full * lanes * self.chain
        last = max(left - lanes * max(self.chain // 2, 1), 0)
        return Rounds(lanes, self.chain, full, full * lanes + min(left, lanes) + last)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Query tiles dealt to thread blocks in rounds: each round of `lanes` thread blocks takes `lanes` · chain in turn.

    `full` rounds have chains of `chain`, one has half of that, and the rest have single query tiles.
    """

    lanes: int
    chain: int
    full: int
    thread_blocks: int

    def of(self, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(first query tile, most query tiles) of a thread block; its others lie `lanes` apart."""
        at, lane = lax.div(block, jnp.int32(self.lanes)), lax.rem(block, jnp.int32(self.lanes))
        half = max(self.chain // 2, 1)
        chain = jnp.where(at < self.full, self.chain, jnp.where(at == self.full, half, 1))
        before = jnp.minimum(at, self.full) * self.chain + jnp.where(at > self.full, half + at - self.full - 1, 0)
        return before * self.lanes + lane, chain
