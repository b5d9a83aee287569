"""Static tuning of the warp-level kernel, and the shared memory that each choice needs on each generation of GPUs."""

from __future__ import annotations

import dataclasses

from pallas_kernels.sizes import KEY_TILE, QUERY_TILE

HEAD_DIMS = (64, 96, 128, 256)

BLOCK_SHARED_MEMORY: dict[tuple[int, ...], int] = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (12, 0): 101_376,
}
"""Bytes of shared memory that one thread block may use, by compute capability."""

TMA_CAPABILITIES: tuple[tuple[int, ...], ...] = ((9, 0), (10, 0))
"""Where the tensor memory accelerator (TMA) copies fastest. GPUs before them have none. On 12.0 it reaches a thread
block's own shared memory only, and every copy that the assembler can't prove to stay there is a call."""


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """How the warp-level kernel is laid out on a multiprocessor. A thread block has four warps.

    - `rows`: query rows of a thread block, 64 or 128: 16 or 32 a warp. More rows read each key less often from shared
      memory and take more registers.
    - `step_keys`: keys of one step, 32 or 64.
    - `stages`: steps whose keys and values are in shared memory or on their way.
    - `queries_in_registers`: keep the query rows there instead of reading them again in every step.
    - `tma`: one thread asks the TMA for whole copies, and barriers count what arrived; otherwise all threads copy, 16
      bytes at a time, by cp.async, which every GPU has.

    Raises ValueError for values that no kernel can be built from.
    """

    rows: int = QUERY_TILE
    step_keys: int = KEY_TILE
    stages: int = 2
    queries_in_registers: bool = False
    tma: bool = False

    def __post_init__(self) -> None:
        if self.rows not in (64, QUERY_TILE):
            raise ValueError(f"rows must be 64 or {QUERY_TILE}; got {self.rows}")
        if self.step_keys not in (32, KEY_TILE):
            raise ValueError(f"step_keys must be 32 or {KEY_TILE}; got {self.step_keys}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2; got {self.stages}")

    def shared_memory_bytes(self, head_dim: int) -> int:
        """Bytes of shared memory for 16-bit inputs: queries; stages of keys, values and bias; barriers."""
        row = 2 * head_dim
        stage = 2 * self.step_keys * row + 2 * KEY_TILE
        return self.rows * row + self.stages * stage + 1_024  # alignment of the swizzled buffers, barriers

    def fits(self, head_dim: int, capability: tuple[int, ...]) -> bool:
        """Whether GPUs of a compute capability have what this needs: shared memory, and TMA if it is to copy."""
        if self.tma and capability < min(TMA_CAPABILITIES):
            return False
        return self.shared_memory_bytes(head_dim) <= BLOCK_SHARED_MEMORY.get(
            capability, min(BLOCK_SHARED_MEMORY.values())
        )


def default_config(head_dim: int, capability: tuple[int, ...]) -> KernelConfig:
    """The configuration that serves a head_dim on GPUs of a compute capability: large tiles that spill nothing."""
    tma = capability in TMA_CAPABILITIES
    if head_dim > 128 or (head_dim > 64 and capability >= (12, 0)):
        return KernelConfig(rows=64, step_keys=32, tma=tma)
    if head_dim > 64:
        return KernelConfig(step_keys=32, stages=3 if tma else 2, tma=tma)
    return KernelConfig(tma=tma)
