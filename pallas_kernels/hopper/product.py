"""One wgmma over values whose rows lie in shared memory in parts.

Pallas's own `wgmma` takes a matrix whose tiles follow each other along its rows. Where key tiles start anywhere, values
arrive in parts of one swizzle width, all keys of the first part before those of the second. The tensor cores read that
just as well: only the distance from one tile to the next differs.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float


def start_product(
    acc: Float[Array, "m h"], weights: Float[Array, "m s"], values: Any, transforms: tuple[Any, Any], swizzle: int
) -> Float[Array, "m h"]:
    """Queues acc + weights · values. The result must not be touched before `plgpu.wgmma_wait`.

    **Arguments:** `values`: shared memory `[parts, s, w]` with parts · w = h, laid out by `transforms`.
    """
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(layout, layout, plgpu.RefType(transforms)),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=layout),
    )
    def product(_, acc, weights, values):
        # Tiles of [8, swizzled row]: [parts, s / 8, 1] of them, or [1, s / 8, h / swizzled row].
        if values.type.shape[0] == 1:
            tiles = mgpu.memref_slice(values, 0)
        else:
            tiles = mgpu.memref_transpose(mgpu.memref_slice(values, (slice(None), slice(None), 0)), (1, 0, 2, 3))
        started = mgpu.wgmma(mgpu.WGMMAAccumulator.from_registers(acc), weights, tiles, swizzle=swizzle)
        none = ir.Type.parse("!llvm.void")
        llvm.inline_asm(none, [], "wgmma.commit_group.sync.aligned;", "", has_side_effects=True)
        return started.value.to_layout(acc.layout)

    return product(acc, weights, values)  # pyright: ignore[reportCallIssue]
