"""Matrix products in other forms than Pallas's own `wgmma` has.

That takes a matrix whose tiles follow each other along its rows. Where key tiles start anywhere, values arrive in parts
of one swizzle width, all keys of the first part before those of the second. The tensor cores read that just as well:
only the distance from one tile to the next differs.

And it adds to what is there. Where that is zero the assembler mostly sees it, but not always: in a loop of four
products it wrote 64 zeros into each thread's registers for one of them.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float

from pallas_kernels.hopper.registers import numbers, with_numbers


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
        _issue("wgmma.commit_group.sync.aligned;")
        return started.value.to_layout(acc.layout)

    return product(acc, weights, values)  # pyright: ignore[reportCallIssue]


def start_scores(queries: Any, keys: Any, transforms: tuple[Any, Any], swizzle: int) -> Float[Array, "m s"]:
    """Queues queries · keysᵀ. The result must not be touched before `plgpu.wgmma_wait`.

    **Arguments:** `queries`, `keys`: shared memory `[64, h]` and `[s, h]` of one dtype, laid out by `transforms`.
    """
    shape = queries.shape[0], keys.shape[0]
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms),) * 2,
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout),
    )
    def product(_, queries, keys):
        nothing = mgpu.FragmentedArray.splat(mgpu.c(0.0, ir.F32Type.get()), shape, mgpu.WGMMA_LAYOUT)
        keys = mgpu.memref_transpose(keys, (1, 0, 3, 2))
        _issue("wgmma.fence.sync.aligned;")
        found = _products(queries, keys, swizzle, len(numbers(nothing)))
        _issue("wgmma.commit_group.sync.aligned;")
        return with_numbers(nothing, iter(found))

    return product(queries, keys)  # pyright: ignore[reportCallIssue]


_NAMES = {"bf16": "bf16", "f16": "f16", "f8E4M3FN": "e4m3"}


def _products(a: ir.Value, b: ir.Value, swizzle: int, count: int) -> list[ir.Value]:
    """a · b as the `count` numbers of each thread, by as many instructions as it takes. The first one adds nothing."""
    (rows, depth), element = mma_utils.tiled_memref_shape(a)
    (_, columns), _ = mma_utils.tiled_memref_shape(b)
    size = mgpu.utils.bytewidth(element)
    part, each = swizzle // size, 32 // size  # of the depth: a swizzled row, and an instruction
    # Where each matrix starts, and the bytes from one instruction and from one part to the next.
    described: list[Any] = [
        mma_utils.create_descriptor(a, swizzle, (rows, part), False),
        mma_utils.create_descriptor(b, swizzle, (part, columns), True),
    ]
    (at_a, (_, (step_a,))), (_, part_a), _ = described[0]
    (at_b, (_, (step_b,))), (_, part_b), _ = described[1]
    float32 = ir.F32Type.get()
    results = ", ".join(f"${i}" for i in range(count))
    kind = f"m{rows}n{columns}k{each}.f32.{_NAMES[str(element)]}.{_NAMES[str(element)]}"
    as_they_are = ", 0, 0" if size == 2 else ""  # neither is transposed, which 8-bit ones can't be
    found: list[ir.Value] = []
    for first in range(0, depth, each):
        whole, rest = first // part, first % part // each
        operands = [
            *found,
            _ahead(at_a, whole * part_a + rest * step_a),
            _ahead(at_b, whole * part_b + rest * step_b),
        ]
        text = (
            f"{{ .reg .pred adds; setp.ne.b32 adds, {int(bool(found))}, 0; wgmma.mma_async.sync.aligned.{kind} "
            f"{{{results}}}, ${count + len(found)}, ${count + len(found) + 1}, adds, 1, 1{as_they_are}; }}"
        )
        constraints = ["=f"] * count + [str(i) for i in range(len(found))] + ["l", "l"]
        numbers_of_all = llvm.StructType.get_literal([float32] * count)
        done = llvm.inline_asm(numbers_of_all, operands, text, ",".join(constraints), has_side_effects=True)
        found = [llvm.extractvalue(float32, done, [i]) for i in range(count)]
    return found


def _ahead(descriptor: ir.Value, distance: int) -> ir.Value:
    """The descriptor of a matrix so many bytes after another."""
    return arith.addi(descriptor, mgpu.c(mma_utils.encode_addr(distance), descriptor.type))


def _issue(instruction: str) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], instruction, "", has_side_effects=True)
