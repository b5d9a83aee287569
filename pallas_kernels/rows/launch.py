"""What the row kernels share: which rows a thread block has, when it loads their pieces, and how it quantizes them.

A row's scale needs its largest number, so a compiler's kernels go over a row twice, and compute twice what it is made
of. Here a thread block holds whole rows in registers between the two, as float32. What threads load lies as what they
store, four elements each: the compiler then moves nothing between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float8e4m3fn, Int32

from pallas_kernels.device import Device
from pallas_kernels.rows.instructions import as_float32

DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0
"""Largest finite e4m3 number."""

WIDEST = 32_768
"""Elements of the longest row: 64 registers of each thread."""

EACH = 4
"""Elements of a piece that a thread has: 16 bytes of the float32 ones."""

Numbers = tuple[Float8e4m3fn[Array, "rows f"], Float[Array, " rows"]]
Refs = Sequence[Any]


class Tile(NamedTuple):
    """Rows of a thread block, which share what belongs to columns; its warps; pieces of a row that it loads ahead."""

    rows: int
    warps: int
    ahead: int


class RowRange(NamedTuple):
    """Rows `start` … `start + rows - 1` of each sequence of an array `[b, t, f]`, of which nothing else is read.

    A slice given to a kernel would be copied first: reads and writes of all that the kernel then reads again. So would
    rows whose columns are cut into n equal groups, each in an array `[b, t, f / n]` of its own: those have a start for
    each array, and `groups` says which group it has.
    """

    start: Int32[Array, "*n"]
    rows: int
    groups: Int32[Array, " n"] | None = None


class Piece(NamedTuple):
    """The columns of a row that a thread block loads at a time, from `start` on; pieces before have those to `fresh`.

    The last piece begins early where pieces do not divide the row: what two of them have is computed and written twice.
    `array`: which one they are loaded from, where each has a group of a row's columns.
    """

    start: int
    size: int
    fresh: int
    array: int = 0

    @property
    def columns(self) -> Any:
        return pl.ds(self.start, self.size)

    def counted(self, value: Float[Array, " size"]) -> Float[Array, " size"]:
        """With zeros where an earlier piece has the same columns."""
        if self.fresh == self.start:
            return value
        return jnp.where(self.start + jnp.arange(self.size, dtype=jnp.int32) >= self.fresh, value, 0)


def unsupported_reason(x: Float[Array, "*rows f"] | jax.ShapeDtypeStruct) -> str | None:
    """Why the kernels can't serve such rows, in words; None if they can."""
    if x.dtype != jnp.bfloat16:
        return f"the kernel reads bfloat16; the rows are {x.dtype}"
    if x.shape[-1] > WIDEST:
        return f"the kernel holds rows of at most {WIDEST:,} elements; these have {x.shape[-1]:,}"
    if x.size >= 2**30:
        return f"the kernel addresses less than {2**30:,} elements; there are {x.size:,}"
    if x.size == 0:
        return f"there is nothing in rows of shape {x.shape}"
    return Device.default().reason_against_fp8()


def launch(
    name: str,
    wide: list[Array],
    others: list[Array],
    value: Callable[[Refs, Piece, list[Any], list[list[Array]]], list[Array]],
    finished: Callable[[Refs, list[Piece], list[Array]], list[Array]],
    tile: Tile | None,
    interpret: bool,
    part: RowRange | None = None,
    keeps: bool = False,
    row_scale: Array | None = None,
    owed: int = 0,
) -> tuple[Array, ...]:
    """A thread block for every few rows of the `wide` arrays: `value` makes one piece of each of its rows from what is
    loaded, `finished` all pieces of one row from theirs.

    With a part, those of the wide arrays that have an axis of sequences are read there. Where it has groups, the wide
    arrays are one whose columns lie apart. `value` is given each row's `row_scale`; where it leaves out `owed` factors
    of that, they are in the scale that results instead. The results are numbers and scales, and if it `keeps` them,
    what `value` makes, in the dtype of the wide arrays.
    """
    *sequences, length, each = wide[0].shape
    apart = part is not None and part.groups is not None
    width = each * len(wide) if apart else each
    rows_each = length if part is None else part.rows
    count = math.prod(sequences) * rows_each
    reason = unsupported_reason(jax.ShapeDtypeStruct((count, width), wide[0].dtype))
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    tile = tile or _tile(width)
    results = -3 if keeps else -2
    pieces = _pieces(each, tile.warps)
    if apart:
        pieces = [piece._replace(array=array) for array in range(len(wide)) for piece in pieces]

    def kernel(*refs: Any) -> None:
        sources, others, (numbers_ref, scale_ref, *kept) = refs[: len(wide)], refs[len(wide) : results], refs[results:]
        *others, groups = others if apart else (*others, None)
        *others, start = others if part is not None else (*others, None)
        given = others.pop(0) if row_scale is not None else None
        first = pl.program_id(0) * tile.rows
        # A last block's missing rows are its last one again.
        rows = [jnp.minimum(first + row, count - 1) for row in range(tile.rows)]
        scales: list[Any] = [given[row] if given is not None else None for row in rows]

        def place(ref: Any, row: Array, piece: Piece) -> tuple[Array, ...]:
            if start is None or ref.ndim == 2:
                return (row,)
            return row // rows_each, start[piece.array] + row % rows_each

        def written(piece: Piece) -> Any:
            return piece.columns if groups is None else pl.ds(groups[piece.array] * each + piece.start, piece.size)

        def load(piece: Piece) -> list[list[Array]]:
            read = sources[piece.array : piece.array + 1] if apart else sources
            at = [[ref.at[*place(ref, row, piece), piece.columns] for ref in read] for row in rows]
            return [[plgpu.load(x, eviction_policy="evict_first") for x in of_row] for of_row in at]

        loaded, parts = [], []
        for index, piece in enumerate(pieces):
            loaded += [load(later) for later in pieces[len(loaded) : index + tile.ahead + 1]]
            parts.append(value(others, piece, scales, loaded[index]))
            for ref in kept:
                for row, y in zip(rows, parts[-1], strict=True):
                    ref[row, piece.columns] = y
        for row, left, of_row in zip(rows, scales, zip(*parts, strict=True), strict=True):
            values = finished(others, pieces, list(of_row))
            largest = folded(jnp.maximum, [jnp.abs(y) for y in values])
            scale = unit = jnp.max(as_float32(largest, interpret)) / LARGEST
            for _ in range(owed):
                scale *= left
            scale = jnp.where(jnp.minimum(unit, scale) < jnp.finfo(jnp.float32).tiny, 0.0, scale)
            inverse = jnp.where(scale > 0, 1 / unit, 0.0)
            for piece, y in zip(pieces, values, strict=True):
                numbers_ref[row, written(piece)] = (as_float32(y, interpret) * inverse).astype(DTYPE)
            scale_ref[row] = scale

    # Of an array of 2**32 bytes and more, which a part may be of, addresses have 64 bits.
    first = []
    if part is not None:
        last = [x.shape[1] - part.rows for x in wide[: part.start.size]]
        first.append(jnp.clip(part.start.reshape(-1), 0, jnp.asarray(last, jnp.int32)))
        first += [] if part.groups is None else [part.groups]
    shapes = [jax.ShapeDtypeStruct((count, width), DTYPE), jax.ShapeDtypeStruct((count,), jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((count, width), wide[0].dtype)] * keeps
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(count, tile.rows),),
        out_shape=tuple(shapes),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*wide, *([] if row_scale is None else [row_scale]), *others, *first)


def _tile(width: int) -> Tile:
    """A warp for 512 elements of a row, up to 8 warps, 16 for rows of more than 8,192; most of a row is loaded ahead.

    On an H200 (commit c746dbf, with 16,384 rows) the gated kernel at width 14,336 took about 6 % less with 16 warps
    than with 8, 5 % less than with 16 for two rows, a tenth less than with 4; an addition and norm at 4,096 took 2 %
    less with 8 warps than with 4, a norm alone 1 %. (In loops, whose own time was estimated and subtracted.)
    """
    most = 8 if width <= 8192 else 16
    return Tile(1, min(most, max(1, pl.next_power_of_2(width) // 512)), 6)


def _pieces(width: int, warps: int) -> list[Piece]:
    size = 32 * warps * EACH
    while size > width:
        size //= 2
    return [Piece(min(start, width - size), size, start) for start in range(0, width, size)]


def alone(refs: Refs, piece: Piece, scales: list[Any], loaded: list[list[Array]]) -> list[Array]:
    return [x for (x,) in loaded]


def unchanged(refs: Refs, pieces: list[Piece], row: list[Array]) -> list[Array]:
    return row


def folded(operation: Callable[[Array, Array], Array], values: list[Array]) -> Array:
    """Pieces into one, element by element: threads then meet once a row."""
    total = values[0]
    for y in values[1:]:
        total = operation(total, y)
    return total
