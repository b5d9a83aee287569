"""The two matrix products of a step, on the warps' own registers: ldmatrix and mma.sync.

Pallas's `load` and `mma` take whole operands: all of a step's keys would wait in registers for their turn. Here each
fragment is loaded right before its products.

One `mma` multiplies 16 rows by 16 numbers each with 8 columns. The four warps share rows: 16 each of every 64. All take
the same columns.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Int

_ROWS = 64  # of four warps
LAYOUT = plgpu.Layout.WGMMA  # of results: the registers of mma's accumulators, in pairs
SINGLES = plgpu.Layout.TILED(  # the same, each number by itself
    mgpu.fragmented_array.Tiling(((_ROWS, 8), (16, 8), (8, 8), (2,), (1,))),
    warp_dims=(-8,),
    lane_dims=(-4, -3),
    vector_dim=-1,
)


def scores(queries: Any, keys: Any, rows: int, transforms: tuple[Any, Any], swizzle: int) -> Float[Array, "m s"]:
    """queries · keysᵀ in float32.

    **Arguments:** `queries`: shared memory `[parts, m, w]`, or the fragments of `query_fragments`; `keys`: shared
    memory `[parts, s, w]`; `transforms`: of the shared memory, tiles of [8, w] with rows of `swizzle` bytes.
    """
    held = isinstance(queries, tuple)
    step, dtype = keys.shape[1], keys.dtype
    kind: Any = (plgpu.Layout.MMA_LHS(dtype),) * len(queries) if held else plgpu.RefType(transforms)

    @plgpu.inline_mgpu(
        arg_types=(kind, plgpu.RefType(transforms)),
        return_type=plgpu.ShapeDtypeStruct((rows, step), jnp.float32, layout=LAYOUT),
    )
    def product(_, queries, keys):
        parts, tiles, _, _, width = keys.type.shape
        sums = _Sums.zeros((rows, 8 * tiles), dtype)
        key_tile = _Fragments(keys, swizzle, high_rows_last=True)
        query_tile = None if held else _Fragments(queries, swizzle)
        for part in range(parts):
            for depth in range(0, width, 16):
                if held:
                    a = _operands(queries[part], depth)
                else:
                    assert query_tile is not None
                    a = [query_tile.load(part, m, depth, warps=True) for m in range(0, rows, _ROWS)]
                for key in range(0, 8 * tiles, 16):
                    b = key_tile.load(part, key, depth)
                    for m, rows_of in enumerate(a):
                        sums.add(m, key // 8, rows_of, b[:2])
                        sums.add(m, key // 8 + 1, rows_of, b[2:])
        return sums.array()

    return product(queries, keys)  # pyright: ignore[reportCallIssue]


def weighted(
    accs: tuple[Float[Array, "m w"], ...],
    weights: Float[Array, "m s"],
    values: Any,
    transforms: tuple[Any, Any],
    swizzle: int,
) -> tuple[Float[Array, "m w"], ...]:
    """accs + weights · values, part by part of head_dim.

    **Arguments:** `weights`: 16-bit floats in the layout of results; `values`: shared memory `[parts, s, w]`.
    """
    dtype = values.dtype
    results = tuple(plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=LAYOUT) for x in accs)

    @plgpu.inline_mgpu(arg_types=((LAYOUT,) * len(accs), LAYOUT, plgpu.RefType(transforms)), return_type=results)
    def product(_, accs, weights, values):
        parts, tiles, _, _, width = values.type.shape
        sums = [_Sums.of(acc, dtype) for acc in accs]
        value_tile = _Fragments(values, swizzle)
        for key in range(0, 8 * tiles, 16):
            a = _operands(weights, key)
            for part in range(parts):
                for column in range(0, width, 16):
                    b = value_tile.load(part, key, column, transpose=True)
                    for m, rows_of in enumerate(a):
                        sums[part].add(m, column // 8, rows_of, b[:2])
                        sums[part].add(m, column // 8 + 1, rows_of, b[2:])
        return tuple(x.array() for x in sums)

    return product(accs, weights, values)  # pyright: ignore[reportCallIssue]


def causal(s: Float[Array, "m s"], first_key: Int[Array, ""]) -> Float[Array, "m s"]:
    """Scores of rows 0 to m - 1 and keys `first_key` and on, -inf where the key comes after the row.

    A thread compares one number, its first row less its first key, with constants: a number for each score would take
    as many registers as the scores.
    """

    result = plgpu.ShapeDtypeStruct(s.shape, jnp.float32, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(LAYOUT, plgpu.Layout.WG_SPLAT(())), return_type=result)
    def mask(_, s, first_key):
        thread = mgpu.utils.thread_idx()

        def number(value: int) -> ir.Value:
            return mgpu.c(value, thread.type)

        row = arith.addi(
            arith.muli(arith.shrui(thread, number(5)), number(16)),
            arith.andi(arith.shrui(thread, number(2)), number(7)),
        )
        (before,) = first_key.registers.flat
        key = arith.addi(before, arith.muli(arith.andi(thread, number(3)), number(2)))
        ahead = arith.subi(row, key)
        nothing = mgpu.c(float("-inf"), ir.F32Type.get())
        sums = _Sums.of(s, jnp.float32)
        for (m, column, i), score in np.ndenumerate(sums.registers):
            first = 8 * column + i % 2 - _ROWS * m - 8 * (i // 2)
            seen = arith.cmpi(arith.CmpIPredicate.sge, ahead, number(first))
            sums.registers[m, column, i] = arith.select(seen, score, nothing)
        return sums.array()

    return mask(s, first_key)  # pyright: ignore[reportCallIssue]


def _operands(x: mgpu.FragmentedArray, depth: int) -> list[list[ir.Value]]:
    """Left operands of the products over numbers `depth` to `depth` + 15 of each row, one for every 64 rows.

    Two neighbouring result tiles have the registers of one operand, in the same order.
    """
    int32 = ir.IntegerType.get_signless(32)
    registers = x.registers.reshape(x.shape[0] // _ROWS, x.shape[1] // 16, 4)
    return [[mgpu.utils.bitcast(r, int32) for r in rows[depth // 16]] for rows in registers]


class _Sums:
    """Accumulators in float32: two registers of two for each tile of 16 x 8."""

    def __init__(self, registers: np.ndarray, shape: tuple[int, ...], dtype: Any) -> None:
        self.registers, self.shape = registers, shape
        self.kind = "bf16" if dtype == jnp.bfloat16 else "f16"

    @classmethod
    def of(cls, x: mgpu.FragmentedArray, dtype: Any) -> _Sums:
        pairs = x.registers.reshape(x.shape[0] // _ROWS, x.shape[1] // 8, 2)
        places = [ir.DenseI64ArrayAttr.get([i]) for i in range(2)]
        flat = np.empty((*pairs.shape[:2], 4), object)
        for (m, column, high), pair in np.ndenumerate(pairs):
            for i, place in enumerate(places):
                flat[m, column, 2 * high + i] = vector.extract(pair, dynamic_position=[], static_position=place)
        return cls(flat, x.shape, dtype)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: Any) -> _Sums:
        zero = mgpu.c(0.0, ir.F32Type.get())
        return cls(np.full((shape[0] // _ROWS, shape[1] // 8, 4), zero, object), shape, dtype)

    def add(self, m: int, column: int, a: list[ir.Value], b: list[ir.Value]) -> None:
        """Adds one product to tile `column` of the `m`-th 64 rows."""
        float32 = ir.F32Type.get()
        code = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{self.kind}.{self.kind}.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        result = llvm.inline_asm(
            llvm.StructType.get_literal([float32] * 4),
            [*a, *b, *self.registers[m, column]],
            code,
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            has_side_effects=False,
        )
        for i in range(4):
            self.registers[m, column, i] = llvm.extractvalue(float32, result, [i])

    def array(self) -> mgpu.FragmentedArray:
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        layout = mgpu.WGMMA_LAYOUT
        made = np.empty((*self.registers.shape[:2], 2), object)
        for at in np.ndindex(*made.shape):
            elements = list(self.registers[at[0], at[1], 2 * at[2] : 2 * at[2] + 2])
            made[at] = vector.from_elements(pair, elements)
        shape = layout.registers_shape(self.shape)
        return mgpu.FragmentedArray(_registers=made.reshape(shape), _layout=layout, _is_signed=None)


class _Fragments:
    """Reads operands from shared memory `[parts, rows / 8, 1, 8, w]`, two tiles of 16 x 8 (or 8 x 16) at a time."""

    def __init__(self, memory: Any, swizzle: int, *, high_rows_last: bool = False) -> None:
        self.shape, self.swizzle = memory.type.shape, swizzle
        thread = mgpu.utils.thread_idx()
        kind = thread.type

        def bit(place: int, weight: int) -> ir.Value:
            shifted = arith.shrui(thread, mgpu.c(place, kind))
            return arith.muli(arith.andi(shifted, mgpu.c(1, kind)), mgpu.c(weight, kind))

        # Lane l names the row of 16 bytes that starts at row (l % 8) of the (l / 8)-th matrix of 8 x 8.
        inner = arith.andi(thread, mgpu.c(7, kind))
        low, high = (4, 3) if high_rows_last else (3, 4)
        row, piece = arith.addi(inner, bit(low, 8)), bit(high, 1)
        if swizzle == 64:
            inner = arith.andi(arith.shrui(thread, mgpu.c(1, kind)), mgpu.c(3, kind))
        offset = arith.addi(
            arith.muli(row, mgpu.c(swizzle, kind)), arith.muli(arith.xori(inner, piece), mgpu.c(16, kind))
        )
        base = llvm.ptrtoint(kind, mgpu.utils.memref_ptr(memory))
        warp = arith.shrui(thread, mgpu.c(5, kind))
        self.start = arith.addi(base, offset)
        self.warp = arith.muli(warp, mgpu.c(16 * swizzle, kind))

    def load(self, part: int, row: int, column: int, *, transpose: bool = False, warps: bool = False) -> list[ir.Value]:
        """Registers of the 16 rows from `row` on, 16 elements each from `column` on; with `warps`, 16 rows a warp."""
        _, tiles, *_ = self.shape
        int32 = ir.IntegerType.get_signless(32)
        start = arith.addi(self.start, self.warp) if warps else self.start
        address = arith.xori(start, mgpu.c(2 * column, int32)) if column else start
        code = f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if transpose else ''}.shared.b16 {{$0,$1,$2,$3}}, [$4"
        place = (part * 8 * tiles + row) * self.swizzle
        result = llvm.inline_asm(
            llvm.StructType.get_literal([int32] * 4),
            [address],
            f"{code}+{place}];",
            "=r,=r,=r,=r,r",
            has_side_effects=True,
        )
        return [llvm.extractvalue(int32, result, [i]) for i in range(4)]
