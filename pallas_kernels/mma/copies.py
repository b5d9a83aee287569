"""Copies of rows from device memory to shared memory by cp.async, 16 bytes a thread at a time.

Pallas's own copies into tiled shared memory start at every eighth row of the source; bands start anywhere. Here each
thread computes its addresses once, and every further piece lies at a constant distance.
"""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

_THREADS = 128
_PIECE = 8  # elements of 16 bits that one thread copies at a time


def copy_rows(source: Any, target: Any, transforms: tuple[Any, Any], swizzle: int) -> None:
    """Starts copying `source` [rows, parts · width] into shared memory `target` [parts, rows, width].

    `target` has these transforms: tiles of [8, width] with rows of `swizzle` bytes. The copies join the next group.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(transforms)))
    def copy(_, source, target):
        parts, tiles, _, _, width = target.type.shape
        stride = source.type.get_strides_and_offset()[0][0]
        pieces = width // _PIECE  # of one row of a part
        at_once = _THREADS // pieces  # rows
        thread = mgpu.utils.thread_idx()
        row, piece = (op(thread, mgpu.c(pieces, thread.type)) for op in (arith.divui, arith.remui))
        start = arith.addi(arith.muli(row, mgpu.c(stride, row.type)), arith.muli(piece, mgpu.c(_PIECE, row.type)))
        first = arith.addi(arith.muli(row, mgpu.c(width, row.type)), arith.muli(piece, mgpu.c(_PIECE, row.type)))
        first = _swizzled(first, swizzle)
        from_pointer = _offset(_global(mgpu.utils.memref_ptr(source)), start)
        to_pointer = _offset(mgpu.utils.memref_ptr(target), first)
        for part in range(parts):
            for rows in range(0, 8 * tiles, at_once):
                nvvm.cp_async_shared_global(
                    _at(to_pointer, (part * 8 * tiles + rows) * width),
                    _at(from_pointer, rows * stride + part * width),
                    2 * _PIECE,
                    nvvm.LoadCacheModifierKind.CG,
                )

    copy(source, target)  # pyright: ignore[reportCallIssue]  # Pallas passes the context


def copy_bias(source: Any, target: Any) -> None:
    """Starts copying a few contiguous 16-bit values, at most 1,024, a multiple of 8. The copies join the next group."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def copy(_, source, target):
        (size,) = target.type.shape
        thread = mgpu.utils.thread_idx()
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, mgpu.c(size // _PIECE, thread.type))):
            offset = arith.muli(thread, mgpu.c(_PIECE, thread.type))
            nvvm.cp_async_shared_global(
                _offset(mgpu.utils.memref_ptr(target), offset),
                _offset(_global(mgpu.utils.memref_ptr(source)), offset),
                2 * _PIECE,
                nvvm.LoadCacheModifierKind.CG,
            )

    copy(source, target)  # pyright: ignore[reportCallIssue]  # Pallas passes the context


def end_group() -> None:
    """The copies started since the last group are the next one."""

    @plgpu.inline_mgpu()
    def commit(_):
        nvvm.cp_async_commit_group()

    commit()  # pyright: ignore[reportCallIssue]  # Pallas passes the context


def wait_groups(pending: int) -> None:
    """Waits until all groups but the last `pending` have arrived, for all threads."""

    @plgpu.inline_mgpu()
    def wait(_):
        nvvm.cp_async_wait_group(pending)
        mgpu.utils.warpgroup_barrier()

    wait()  # pyright: ignore[reportCallIssue]  # Pallas passes the context


def _swizzled(offset: ir.Value, swizzle: int) -> ir.Value:
    """Where an element at `offset` of 16-byte aligned pieces lies, with rows of `swizzle` bytes: the row's number is
    added, bit by bit without carry, to that of the piece."""
    # In bytes, bits 7 and up go into bits 4 and up; offsets count elements of two bytes.
    moved = arith.shrui(offset, mgpu.c(3, offset.type))
    return arith.xori(offset, arith.andi(moved, mgpu.c(swizzle // 2 - _PIECE, offset.type)))


def _global(pointer: ir.Value) -> ir.Value:
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), pointer)


def _offset(pointer: ir.Value, elements: ir.Value) -> ir.Value:
    return mgpu.utils.getelementptr(pointer, [elements], ir.IntegerType.get_signless(16))


def _at(pointer: ir.Value, elements: int) -> ir.Value:
    return mgpu.utils.getelementptr(pointer, [elements], ir.IntegerType.get_signless(16))
