"""What a GPU does with 16-bit keys of tiles: counts them by digit, and lists those that reach a level.

A key says what a visit of its tile is worth; 0 means that it is never visited. Both functions are written for single
threads, below Pallas's own vocabulary: a histogram needs atomic additions, a list needs ballots. There is nothing that
the Mosaic GPU interpreter could run of them; `minference_jax.index.level` has the same in jnp, and they agree exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, math, memref, nvvm, scf
from jaxtyping import Array, Int, UInt16

from pallas_kernels import axes
from pallas_kernels.device import DEFAULT_MULTIPROCESSORS
from pallas_kernels.tracing import without_axes

_LANES, _WARPS = 32, 4
_VECTOR = 8  # keys that a thread loads at once: 16 bytes
_UNROLL = 4  # loads in flight
_MOST_KEYS = 1 << 17  # of a thread block, so that its sums of up to 64 · 128 cells stay below 2³¹


def digit_counts(
    keys: UInt16[Array, "b n i j"],
    rows: Int[Array, "b i"],
    open_keys: Int[Array, "b n j"] | None,
    prefix: Int[Array, " b"] | None,
    *,
    shift: int,
    bits: int,
) -> Int[Array, "b c d"]:
    """Cells of the keys of each digit (key >> shift) & (2^bits − 1), as partial sums of c thread blocks.

    A key counts `rows` of its query tile times, if given times `open_keys` of its key tile. Digit 0 counts nothing.

    **Arguments:** `prefix`: of each sequence; keys with other bits above the digit count nothing. None: all count.
    """
    b, n, tiles, width = keys.shape
    keys = jnp.pad(keys, ((0, 0), (0, 0), (0, 0), (0, -width % _VECTOR)))
    if open_keys is not None:
        open_keys = jnp.pad(open_keys, ((0, 0), (0, 0), (0, -width % _VECTOR)))
    vectors = keys.shape[-1] // _VECTOR
    total = n * tiles * vectors
    blocks = max(1, min(4 * DEFAULT_MULTIPROCESSORS, -(-total // (_UNROLL * _LANES * _WARPS))))
    blocks = max(blocks, -(-total * _VECTOR // _MOST_KEYS))
    threads = blocks * _LANES * _WARPS
    arrays = [keys.reshape(b, -1), rows]
    arrays += [x for x in (None if open_keys is None else open_keys.reshape(b, -1), prefix) if x is not None]

    def emit(_: Any, keys: Any, rows: Any, *rest: Any) -> None:
        *optional, counts, sums = rest
        opens = optional.pop(0) if open_keys is not None else None
        wanted = optional.pop(0) if prefix is not None else None
        batch, block = (f(_block(), _int(blocks)) for f in (arith.divui, arith.remui))
        thread = _thread()
        for first in range(0, 1 << bits, _LANES * _WARPS):
            memref.store(_int(0), sums, [_index(arith.addi(thread, _int(first)))])
        mgpu_utils.warpgroup_barrier()
        source, target = mgpu_utils.memref_ptr(keys), llvm.ptrtoint(_i32(), mgpu_utils.memref_ptr(sums))
        match = None if wanted is None else memref.load(wanted, [_index(batch)])
        start = arith.addi(arith.muli(block, _int(_LANES * _WARPS)), thread)

        def step(turn: ir.Value) -> None:
            at, loaded = [], []
            for u in range(_UNROLL):
                place = arith.addi(
                    start, arith.muli(arith.addi(arith.muli(turn, _int(_UNROLL)), _int(u)), _int(threads))
                )
                inside = arith.cmpi(arith.CmpIPredicate.ult, place, _int(total))
                place = arith.select(inside, place, _int(0))
                at.append((inside, place))
                loaded.append(_load_words(source, batch, place, total))
            for (inside, place), words in zip(at, loaded, strict=True):
                row, vector = arith.divui(place, _int(vectors)), arith.remui(place, _int(vectors))
                tile = arith.remui(row, _int(tiles))
                cells = memref.load(rows, [_index(batch), _index(tile)])
                cells = arith.select(inside, cells, _int(0))
                for i in range(_VECTOR):
                    key = arith.andi(arith.shrui(words[i // 2], _int(16 * (i % 2))), _int(0xFFFF))
                    digit = arith.andi(arith.shrui(key, _int(shift)), _int((1 << bits) - 1))
                    counted = digit
                    if match is not None:
                        same = arith.cmpi(arith.CmpIPredicate.eq, arith.shrui(key, _int(shift + bits)), match)
                        counted = arith.select(same, digit, _int(0))
                    weight = cells
                    if opens is not None:
                        head = arith.divui(row, _int(tiles))
                        column = arith.addi(arith.muli(vector, _int(_VECTOR)), _int(i))
                        column = arith.addi(arith.muli(head, _int(vectors * _VECTOR)), column)
                        weight = arith.muli(cells, memref.load(opens, [_index(batch), _index(column)]))
                    address = arith.addi(target, arith.muli(digit, _int(4)))
                    llvm.inline_asm(
                        ir.Type.parse("!llvm.void"),
                        [address, weight, counted],
                        "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p red.shared.add.u32 [$0], $1; }",
                        "r,r,r",
                        has_side_effects=True,
                    )

        _repeat(-(-total // (threads * _UNROLL)), step)
        mgpu_utils.warpgroup_barrier()
        for first in range(0, 1 << bits, _LANES * _WARPS):
            digit = _index(arith.addi(thread, _int(first)))
            memref.store(memref.load(sums, [digit]), counts, [_index(batch), _index(block), digit])

    return _launch(
        emit,
        arrays,
        [jax.ShapeDtypeStruct((b, blocks, 1 << bits), jnp.int32)],
        grid=b * blocks,
        name="digit_counts",
        scratch={"sums": plgpu.SMEM((1 << bits,), jnp.int32)},
    )[0]


def key_lists(
    keys: UInt16[Array, "b n i j"], level: Int[Array, " b"], ties: Int[Array, "b n i"]
) -> tuple[Int[Array, "b n i j"], Int[Array, "b n i"]]:
    """Places of the keys of each query tile above its sequence's level, and of the first `ties` at it; ascending.

    **Returns:** the places, whatever was in memory from the count on, and the counts. Keys of 0 are never listed.
    """
    b, n, tiles, width = keys.shape
    rows = b * n * tiles

    def emit(_: Any, keys: Any, level: Any, ties: Any, places: Any, counts: Any) -> None:
        lane = arith.remui(_thread(), _int(_LANES))
        row = arith.addi(arith.muli(_block(), _int(_WARPS)), arith.divui(_thread(), _int(_LANES)))
        row_at = _index(row)

        def list_row() -> None:
            limit = memref.load(level, [_index(arith.divui(row, _int(n * tiles)))])
            at_most = memref.load(ties, [row_at])
            before = arith.subi(arith.shli(_int(1), lane), _int(1))  # lanes before this one

            def step(turn: ir.Value, count: ir.Value, tied: ir.Value) -> list[ir.Value]:
                found = []
                for u in range(2 * _UNROLL):
                    place = arith.addi(arith.muli(turn, _int(2 * _UNROLL * _LANES)), arith.addi(lane, _int(u * _LANES)))
                    inside = arith.cmpi(arith.CmpIPredicate.ult, place, _int(width))
                    key = memref.load(keys, [row_at, _index(arith.select(inside, place, _int(0)))])
                    found.append((place, arith.select(inside, arith.extui(_i32(), key), _int(0))))
                for place, key in found:
                    above = arith.cmpi(arith.CmpIPredicate.ugt, key, limit)
                    at_level = arith.andi(
                        arith.cmpi(arith.CmpIPredicate.eq, key, limit),
                        arith.cmpi(arith.CmpIPredicate.ne, key, _int(0)),
                    )
                    at_level_lanes = _ballot(at_level)
                    rank = arith.addi(tied, math.ctpop(arith.andi(at_level_lanes, before)))
                    taken = arith.ori(above, arith.andi(at_level, arith.cmpi(arith.CmpIPredicate.slt, rank, at_most)))
                    taken_lanes = _ballot(taken)
                    slot = arith.addi(count, math.ctpop(arith.andi(taken_lanes, before)))
                    _where(taken, lambda slot=slot, place=place: memref.store(place, places, [row_at, _index(slot)]))
                    count = arith.addi(count, math.ctpop(taken_lanes))
                    tied = arith.addi(tied, math.ctpop(at_level_lanes))
                return [count, tied]

            count, _ = _repeat(-(-width // (2 * _UNROLL * _LANES)), step, _int(0), _int(0))
            first = arith.cmpi(arith.CmpIPredicate.eq, lane, _int(0))
            _where(first, lambda: memref.store(count, counts, [row_at]))

        _where(arith.cmpi(arith.CmpIPredicate.ult, row, _int(rows)), list_row)

    places, counts = _launch(
        emit,
        [keys.reshape(rows, width), level, ties.reshape(rows)],
        [jax.ShapeDtypeStruct((rows, width), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)],
        grid=-(-rows // _WARPS),
        name="key_lists",
    )
    return places.reshape(b, n, tiles, width), counts.reshape(b, n, tiles)


def _launch(
    emit: Callable[..., None],
    arrays: list[Array],
    out_type: list[jax.ShapeDtypeStruct],
    *,
    grid: int,
    name: str,
    scratch: dict[str, Any] | None = None,
) -> list[Array]:
    """Runs `emit` in thread blocks of 128 threads on references to arrays, results and scratch, in this order."""
    scratch = scratch or {}

    def body(*refs: Any, **scratch_refs: Any) -> None:
        refs = (*refs, *scratch_refs.values())
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))(emit)(*refs)

    return without_axes(
        plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=scratch,
            grid=(grid,),
            grid_names=(axes.BLOCK,),
            num_threads=1,
            thread_name=axes.WARPGROUP,
            kernel_name=name,
        )
    )(*arrays)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _int(value: int) -> ir.Value:
    return arith.constant(_i32(), value)


def _index(value: ir.Value) -> ir.Value:
    return arith.index_castui(ir.IndexType.get(), value)


def _block() -> ir.Value:
    return arith.index_castui(_i32(), gpu.block_id(gpu.Dimension.x))


def _thread() -> ir.Value:
    return arith.index_castui(_i32(), gpu.thread_id(gpu.Dimension.x))


def _ballot(flag: ir.Value) -> ir.Value:
    """The lanes of this warp where the flag is set, a bit each."""
    return nvvm.vote_sync(arith.constant(_i32(), -1), flag, "ballot")


def _load_words(source: ir.Value, batch: ir.Value, place: ir.Value, total: int) -> list[ir.Value]:
    """The eight keys at a place of a sequence's vectors, as four words."""
    i64, words = ir.IntegerType.get_signless(64), ir.VectorType.get((_VECTOR // 2,), _i32())
    wide = [arith.extui(i64, x) for x in (batch, place)]
    at = arith.addi(arith.muli(wide[0], arith.constant(i64, total)), wide[1])
    at = llvm.inttoptr(source.type, arith.addi(llvm.ptrtoint(i64, source), arith.muli(at, arith.constant(i64, 16))))
    loaded = llvm.load(words, at, alignment=16)
    return [llvm.extractelement(loaded, _int(i)) for i in range(_VECTOR // 2)]


def _where(flag: ir.Value, function: Callable[[], Any]) -> None:
    branch = scf.IfOp(flag)
    with ir.InsertionPoint(branch.then_block):
        function()
        scf.yield_([])


def _repeat(times: int, step: Callable[..., Any], *carry: ir.Value) -> list[ir.Value]:
    """step(turn, *carry) for each turn, which returns the carry of the next."""
    loop = scf.ForOp(_int(0), _int(times), _int(1), list(carry))
    with ir.InsertionPoint(loop.body):
        scf.yield_(step(loop.induction_variable, *loop.inner_iter_args) or [])
    return list(loop.results)
