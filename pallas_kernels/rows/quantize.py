"""Rows as e4m3 numbers with a scale each, after a norm or a gated activation: each input is read once.

A row's scale needs its largest number, so a compiler's kernels go over a row twice, and compute twice what it is made
of. Here a thread block holds whole rows in registers between the two, as float32.

Activations are in float32 and not rounded in between: the gated kernel has some 30 instructions an element, and does
not hide them behind its bytes (2.6 TB/s on an H200 at [16384, 14336], commit 67d022b; the others 3.1 at [16384, 4096]).
What threads load lies as what they store, four elements each: the compiler then moves nothing between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float8e4m3fn, Int32

from pallas_kernels.device import Device

DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0
"""Largest finite e4m3 number."""

WIDEST = 32_768
"""Elements of the longest row: 64 registers of each thread."""

EACH = 4
"""Elements of a piece that a thread has: 16 bytes of the float32 ones."""

LOG2_E = 1.4426950408889634

Activation = Literal["silu", "gelu"]
Numbers = tuple[Float8e4m3fn[Array, "rows f"], Float[Array, " rows"]]
Refs = Sequence[Any]


class Tile(NamedTuple):
    """Rows of a thread block, which share what belongs to columns; its warps; pieces of a row that it loads ahead."""

    rows: int
    warps: int
    ahead: int


class RowRange(NamedTuple):
    """Rows `start` … `start + rows - 1` of each sequence of an array `[b, t, f]`, of which nothing else is read.

    A slice given to a kernel would be copied first: reads and writes of all that the kernel then reads again.
    """

    start: Int32[Array, ""]
    rows: int


class Piece(NamedTuple):
    """The columns of a row that a thread block loads at a time, from `start` on; pieces before have those to `fresh`.

    The last piece begins early where pieces do not divide the row: what two of them have is computed and written twice.
    """

    start: int
    size: int
    fresh: int

    @property
    def columns(self) -> Any:
        return pl.ds(self.start, self.size)

    def counted(self, value: Float[Array, " size"]) -> Float[Array, " size"]:
        """With zeros where an earlier piece has the same columns."""
        if self.fresh == self.start:
            return value
        return jnp.where(self.start + jnp.arange(self.size, dtype=jnp.int32) >= self.fresh, value, 0)


def quantized_rows(
    x: Float[Array, "*rows f"], *, part: RowRange | None = None, tile: Tile | None = None, interpret: bool = False
) -> Numbers:
    """x as e4m3 numbers and float32 scales: x ≈ numbers · scale.

    **Arguments:**

    - `x`: `[rows, f]`, bfloat16, f at most 32,768; `[b, t, f]` with a part.
    - `part`: the rows that are wanted, those of the first sequence before those of the second; None for all.
    - `tile` (static): how a thread block takes rows; by default a row, and 28 to 56 elements a thread.
    - `interpret` (static): run the kernel on a CPU, for tests.

    **Returns:** the numbers `[rows, f]` and scales `[rows]`: a row's largest magnitude over 448. A row whose scale
    would be subnormal is one of zeros, with scale 0. A row with a NaN or an infinity has NaN numbers.

    **Raises:** ValueError for what does not fit, with the reason that `unsupported_reason` gives.
    """
    return _launch("quantized_rows", [x], [], _alone, _unchanged, tile, interpret, part)


def normed_rows(
    x: Float[Array, "*rows f"],
    weight: Float[Array, " f"],
    *,
    eps: float,
    offset: float | None = None,
    part: RowRange | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Numbers:
    """RMSNorm of x, quantized: as `quantized_rows` of x / √(mean(x²) + eps), rounded to x's dtype, times the weight.

    **Arguments:** those of `quantized_rows`, and

    - `weight`: `[f]`, in x's dtype.
    - `eps`, `offset` (static): with an offset, the weight is offset + weight in float32, and rounding comes after it.

    **Returns**, **Raises:** as `quantized_rows`. Sums are float32, in an order of their own.
    """
    dtype, width = x.dtype, x.shape[-1]

    def rounded(y: Array) -> Array:
        return y.astype(dtype).astype(jnp.float32)

    def normed(refs: Refs, pieces: list[Piece], row: list[Array]) -> list[Array]:
        squares = [piece.counted(y * y) for piece, y in zip(pieces, row, strict=True)]
        factor = jax.lax.rsqrt(jnp.sum(_folded(jnp.add, squares)) / width + eps)
        weights = [refs[0][piece.columns].astype(jnp.float32) for piece in pieces]
        if offset is not None:
            return [rounded(y * factor * (offset + w)) for y, w in zip(row, weights, strict=True)]
        return [rounded(rounded(y * factor) * w) for y, w in zip(row, weights, strict=True)]

    return _launch("normed_rows", [x], [weight], _alone, normed, tile, interpret, part)


def gated_rows(
    gate: Float[Array, "rows f"],
    up: Float[Array, "rows f"],
    row_scale: Float[Array, " rows"],
    gate_scale: Float[Array, " f"],
    up_scale: Float[Array, " f"],
    *,
    activation: Activation = "silu",
    tile: Tile | None = None,
    interpret: bool = False,
) -> Numbers:
    """The gated activation of two FP8 products whose scales are not applied yet, quantized.

    `quantized_rows` of activation(gate · row_scale · gate_scale) · (up · row_scale · up_scale), all of it in float32.
    jnp in 16 bits rounds six times on the way: numbers may differ from that by one step of e4m3, and small ones of GELU
    by 1/500 of the row's largest.

    **Arguments:** those of `quantized_rows`, for gate and up, and

    - `row_scale`: float32 `[rows]`.
    - `gate_scale`, `up_scale`: float32 `[f]`.
    - `activation` (static): "silu", or "gelu" in the form with a tanh.

    **Returns**, **Raises:** as `quantized_rows`.
    """
    act = ACTIVATIONS[activation]

    def product(refs: Refs, piece: Piece, rows: list[Array], loaded: list[list[Array]]) -> list[Array]:
        scales, *channels = refs
        for_gate, for_up = (ref[piece.columns] for ref in channels)
        found = []
        for row, (g, u) in zip(rows, loaded, strict=True):
            scale = scales[row]
            found.append(act(g * scale * for_gate) * (u * scale * for_up))
        return found

    return _launch("gated_rows", [gate, up], [row_scale, gate_scale, up_scale], product, _unchanged, tile, interpret)


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


def _launch(
    name: str,
    wide: list[Array],
    others: list[Array],
    value: Callable[[Refs, Piece, list[Array], list[list[Array]]], list[Array]],
    finished: Callable[[Refs, list[Piece], list[Array]], list[Array]],
    tile: Tile | None,
    interpret: bool,
    part: RowRange | None = None,
) -> Numbers:
    """A thread block for every few rows of the `wide` arrays: `value` makes one piece of each of its rows from what is
    loaded, `finished` all pieces of one row from theirs.
    """
    *sequences, length, width = wide[0].shape
    rows_each = length if part is None else part.rows
    count = math.prod(sequences) * rows_each
    reason = unsupported_reason(jax.ShapeDtypeStruct((count, width), wide[0].dtype))
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    tile = tile or _tile(width)
    pieces = _pieces(width, tile.warps)

    def kernel(*refs: Any) -> None:
        sources, others, (numbers_ref, scale_ref) = refs[: len(wide)], refs[len(wide) : -2], refs[-2:]
        *others, start = others if part is not None else (*others, None)
        first = pl.program_id(0) * tile.rows
        # A last block's missing rows are its last one again.
        rows = [jnp.minimum(first + row, count - 1) for row in range(tile.rows)]

        places = [(row,) if start is None else (row // rows_each, start[0] + row % rows_each) for row in rows]

        def load(piece: Piece) -> list[list[Array]]:
            at = [[ref.at[*place, piece.columns] for ref in sources] for place in places]
            return [[plgpu.load(x, eviction_policy="evict_first") for x in of_row] for of_row in at]

        loaded, parts = [], []
        for index, piece in enumerate(pieces):
            loaded += [load(later) for later in pieces[len(loaded) : index + tile.ahead + 1]]
            numbers = [[x.astype(jnp.float32) for x in of_row] for of_row in loaded[index]]
            parts.append(value(others, piece, rows, numbers))
        for row, of_row in zip(rows, zip(*parts, strict=True), strict=True):
            values = finished(others, pieces, list(of_row))
            scale = jnp.max(_folded(jnp.maximum, [jnp.abs(y) for y in values])) / LARGEST
            scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0.0, scale)
            inverse = jnp.where(scale > 0, 1 / scale, 0.0)
            for piece, y in zip(pieces, values, strict=True):
                numbers_ref[row, piece.columns] = (y * inverse).astype(DTYPE)
            scale_ref[row] = scale

    # Of an array of 2**32 bytes and more, which a part may be of, addresses have 64 bits.
    first = [] if part is None else [jnp.clip(part.start, 0, length - part.rows).reshape(1)]
    numbers, scale = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(count, tile.rows),),
        out_shape=[jax.ShapeDtypeStruct((count, width), DTYPE), jax.ShapeDtypeStruct((count,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*wide, *others, *first)
    return numbers, scale


def _tile(width: int) -> Tile:
    """A row of up to 1,024 elements for a warp, and so on to 16 warps.

    On an H200 (commit 67d022b) the gated kernel took .447 ms so at [16384, 14336], with 4 pieces ahead .435, with 8
    warps .457, with two rows .481; jnp .804.
    """
    return Tile(1, min(16, max(1, pl.next_power_of_2(width) // 1024)), 2)


def _pieces(width: int, warps: int) -> list[Piece]:
    size = 32 * warps * EACH
    while size > width:
        size //= 2
    return [Piece(min(start, width - size), size, start) for start in range(0, width, size)]


def _alone(refs: Refs, piece: Piece, rows: list[Array], loaded: list[list[Array]]) -> list[Array]:
    return [x for (x,) in loaded]


def _unchanged(refs: Refs, pieces: list[Piece], row: list[Array]) -> list[Array]:
    return row


def _folded(operation: Callable[[Array, Array], Array], values: list[Array]) -> Array:
    """Pieces into one, element by element: threads then meet once a row."""
    total = values[0]
    for y in values[1:]:
        total = operation(total, y)
    return total


def _silu(x: Array) -> Array:
    return x / (1 + jnp.exp2(-LOG2_E * x))


def _gelu(x: Array) -> Array:
    # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2y)), which keeps its precision where it is small.
    return x / (1 + jnp.exp2(-2 * LOG2_E * 0.7978845608 * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {"silu": _silu, "gelu": _gelu}
"""Activations of float32 numbers, inside kernels."""
