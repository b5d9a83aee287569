"""RMSNorm of rows as e4m3 numbers with a scale each, of the residual stream as it is or with a product added to it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn

from pallas_kernels.rows.instructions import as_bfloat16, as_float32, multiply_add
from pallas_kernels.rows.launch import Numbers, Piece, Refs, RowRange, Tile, alone, launch


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
    numbers, scale = launch(
        "normed_rows", [x], [weight], alone, _normed(x.shape[-1], eps, offset, interpret), tile, interpret, part
    )
    return numbers, scale


def added_rows(
    x: Float[Array, "*rows f"],
    y: Float[Array, "rows f"],
    row_scale: Float[Array, " rows"],
    channel_scale: Float[Array, " f"],
    weight: Float[Array, " f"],
    *,
    eps: float,
    offset: float | None = None,
    part: RowRange | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> tuple[Float8e4m3fn[Array, "rows f"], Float[Array, " rows"], Float[Array, "rows f"]]:
    """x plus an FP8 product whose scales are not applied yet, and `normed_rows` of the sum.

    The sum is x + y · row_scale · channel_scale; the product is scaled in float32 and rounded to x's dtype, and then
    the sum is.

    **Arguments:** those of `normed_rows`, and

    - `y`: `[rows, f]`, in x's dtype: rows of the product, as many as are wanted of x.
    - `row_scale`, `channel_scale`: float32 `[rows]` and `[f]`.

    **Returns:** the numbers `[rows, f]` and scales `[rows]` of the norm, as `quantized_rows`, and the sum `[rows, f]`.

    **Raises:** as `quantized_rows`.
    """

    def added(refs: Refs, piece: Piece, scales: list[Array], loaded: list[list[Array]]) -> list[Array]:
        channel = refs[0][piece.columns]
        wide = [as_float32(y, interpret) * scale * channel for scale, (_, y) in zip(scales, loaded, strict=True)]
        return [before + as_bfloat16(product, interpret) for (before, _), product in zip(loaded, wide, strict=True)]

    others, finished = [channel_scale, weight], _normed(x.shape[-1], eps, offset, interpret)
    numbers, scale, total = launch(
        "added_rows", [x, y], others, added, finished, tile, interpret, part, keeps=True, row_scale=row_scale
    )
    return numbers, scale, total


def _normed(
    width: int, eps: float, offset: float | None, interpret: bool
) -> Callable[[Refs, list[Piece], list[Array]], list[Array]]:
    """RMSNorm of a row of a width, inside a kernel; the weight is the last of its references."""

    def normed(refs: Refs, pieces: list[Piece], row: list[Array]) -> list[Array]:
        weights = [refs[-1][piece.columns] for piece in pieces]
        wide = [as_float32(y, interpret) for y in row]
        squares = jnp.zeros_like(wide[0])
        for piece, y in zip(pieces, wide, strict=True):
            squares = multiply_add(piece.counted(y), y, squares, interpret)
        factor = jax.lax.rsqrt(jnp.sum(squares) / width + eps)
        if offset is None:
            return [as_bfloat16(y * factor, interpret) * w for y, w in zip(wide, weights, strict=True)]
        weights = [offset + as_float32(w, interpret) for w in weights]
        return [as_bfloat16(y * factor * w, interpret) for y, w in zip(wide, weights, strict=True)]

    return normed
