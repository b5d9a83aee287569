"""RMSNorm of rows as e4m3 numbers with a scale each, of the residual stream as it is or with a product added to it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn

from pallas_kernels.rows.launch import Numbers, Piece, Refs, RowRange, Tile, alone, folded, launch


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
    numbers, scale = launch("normed_rows", [x], [weight], alone, _normed(x, eps, offset), tile, interpret, part)
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

    def added(refs: Refs, piece: Piece, rows: list[Array], loaded: list[list[Array]]) -> list[Array]:
        scales, channels, _ = refs
        channel = channels[piece.columns]
        products = [_rounded(y * scales[row] * channel, x) for row, (_, y) in zip(rows, loaded, strict=True)]
        return [_rounded(before + product, x) for (before, _), product in zip(loaded, products, strict=True)]

    others, finished = [row_scale, channel_scale, weight], _normed(x, eps, offset)
    numbers, scale, total = launch("added_rows", [x, y], others, added, finished, tile, interpret, part, keeps=True)
    return numbers, scale, total


def _normed(x: Array, eps: float, offset: float | None) -> Callable[[Refs, list[Piece], list[Array]], list[Array]]:
    """RMSNorm of a row like x's, inside a kernel; the weight is the last of its references."""

    def normed(refs: Refs, pieces: list[Piece], row: list[Array]) -> list[Array]:
        squares = [piece.counted(y * y) for piece, y in zip(pieces, row, strict=True)]
        factor = jax.lax.rsqrt(jnp.sum(folded(jnp.add, squares)) / x.shape[-1] + eps)
        weights = [refs[-1][piece.columns].astype(jnp.float32) for piece in pieces]
        if offset is not None:
            return [_rounded(y * factor * (offset + w), x) for y, w in zip(row, weights, strict=True)]
        return [_rounded(_rounded(y * factor, x) * w, x) for y, w in zip(row, weights, strict=True)]

    return normed


def _rounded(y: Array, x: Array) -> Array:
    """float32 numbers as x's dtype has them."""
    return y.astype(x.dtype).astype(jnp.float32)
