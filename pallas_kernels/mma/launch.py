"""What is static about one launch of the warp-level kernel, and its shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launches import swizzle_of, tile_transforms
from pallas_kernels.mma.config import KernelConfig
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE


@dataclasses.dataclass(frozen=True)
class Launch:
    """Everything static about one launch.

    - `emulate`: jnp.dot instead of mma, for the interpreter.
    """

    config: KernelConfig
    heads: int
    kv_heads: int
    query_tiles: int
    head_dim: int
    scale: float
    dtype: Any
    emulate: bool

    @property
    def swizzle(self) -> int:
        """Bytes of one swizzled row."""
        return swizzle_of(self.head_dim)

    @property
    def part_width(self) -> int:
        """Elements of a swizzled row. Rows of head_dim elements lie in shared memory in `parts` of this width."""
        return self.swizzle // 2

    @property
    def parts(self) -> int:
        return self.head_dim // self.part_width

    @property
    def transforms(self) -> tuple[Any, Any]:
        """What lays rows out in shared memory so that ldmatrix meets no bank conflicts."""
        return tile_transforms(self.head_dim)

    @property
    def blocks_per_tile(self) -> int:
        """Thread blocks that share a query tile."""
        return QUERY_TILE // self.config.rows

    @property
    def two_views(self) -> bool:
        """Whether K and V are copied into another view of the shared memory than they are read from."""
        return self.config.tma and not self.emulate


def scratch_types(launch: Launch) -> dict[str, Any]:
    """Shared memory and barriers of one thread block."""
    config, dtype = launch.config, launch.dtype
    parts, width = launch.parts, launch.part_width

    def rows_of(*shape: int):
        return plgpu.SMEM(shape, dtype, transforms=launch.transforms)

    def loaded(*shape: int):
        # The same bytes twice: TMA copies into the untiled view may start at any row of the source, those into the
        # tiled view only at every eighth.
        if not launch.two_views:
            return rows_of(*shape)
        return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=launch.transforms[1:]), rows_of(*shape))

    types: dict[str, Any] = {
        "q_smem": rows_of(parts, config.rows, width),
        "k_smem": loaded(config.stages, parts, config.step_keys, width),
        "v_smem": loaded(config.stages, parts, config.step_keys, width),
        "bias_smem": plgpu.SMEM((config.stages, KEY_TILE), jnp.bfloat16),
    }
    if config.tma:
        types["q_full"] = plgpu.Barrier(num_arrivals=parts)
        types["kv_full"] = plgpu.Barrier(num_arrivals=2 * parts, num_barriers=config.stages)
        types["bias_full"] = plgpu.Barrier(num_arrivals=1, num_barriers=config.stages)
    return types


def views(ref: Any, launch: Launch) -> tuple[Any, Any]:
    """(what copies write, what products read) of a `loaded` buffer."""
    return tuple(ref) if launch.two_views else (ref, ref)
