"""Rows as e4m3 numbers with a scale each, alone or after a gated activation: each input is read once.

Activations are in float32 and not rounded in between. What a row is multiplied with as a whole is left to its scale,
which spares two products an element: the gated kernel has 16 instructions for one, two of which a GPU issues at an
eighth of the others' rate. At an H200's full clock it takes as long as with 27 ([16384, 14336], commit c746dbf).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.rows.instructions import as_float32, one_over_one_plus_power
from pallas_kernels.rows.launch import Numbers, Piece, Refs, RowRange, Tile, alone, launch, unchanged

LOG2_E = 1.4426950408889634

Activation = Literal["silu", "gelu"]


def quantized_rows(
    x: Float[Array, "*rows f"] | tuple[Float[Array, "b _ g"], ...],
    *,
    part: RowRange | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Numbers:
    """x as e4m3 numbers and float32 scales: x ≈ numbers · scale.

    **Arguments:**

    - `x`: `[rows, f]`, bfloat16, f at most 32,768; `[b, t, f]` with a part; with one that has n groups of columns, n
      arrays `[b, t, f / n]`, each with its own t.
    - `part`: the rows that are wanted, those of the first sequence before those of the second; None for all.
    - `tile` (static): how a thread block takes rows; by default a row, in registers of 1 to 16 warps.
    - `interpret` (static): run the kernel on a CPU, for tests.

    **Returns:** the numbers `[rows, f]` and scales `[rows]`: a row's largest magnitude over 448. A row whose scale
    would be subnormal is one of zeros, with scale 0. A row with a NaN or an infinity has NaN numbers.

    **Raises:** ValueError for what does not fit, with the reason that `unsupported_reason` gives.
    """
    numbers, scale = launch(
        "quantized_rows", list(x) if isinstance(x, tuple) else [x], [], alone, unchanged, tile, interpret, part
    )
    return numbers, scale


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
    exponent = EXPONENTS[activation]

    def product(refs: Refs, piece: Piece, scales: list[Array], loaded: list[list[Array]]) -> list[Array]:
        for_gate, for_up = (ref[piece.columns] for ref in refs)
        found = []
        for scale, (g, u) in zip(scales, loaded, strict=True):
            x, y = as_float32(g, interpret) * for_gate, as_float32(u, interpret) * for_up
            found.append(x * one_over_one_plus_power(exponent(x, scale), interpret) * y)
        return found

    numbers, scale = launch(
        "gated_rows",
        [gate, up],
        [gate_scale, up_scale],
        product,
        unchanged,
        tile,
        interpret,
        row_scale=row_scale,
        owed=2,
    )
    return numbers, scale


def activated(x: Array, activation: Activation) -> Array:
    """Inside other kernels: the activation of float32 numbers."""
    return x / (1 + jnp.exp2(EXPONENTS[activation](x, 1.0)))


def _silu(x: Array, scale: Array | float) -> Array:
    return x * (-LOG2_E * scale)


def _gelu(x: Array, scale: Array | float) -> Array:
    # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2y)), which keeps its precision where it is small.
    y, factor = x * scale, -2 * LOG2_E * 0.7978845608
    return y * (factor + 0.044715 * factor * (y * y))


EXPONENTS: dict[Activation, Callable[[Array, Array | float], Array]] = {"silu": _silu, "gelu": _gelu}
"""The activation of y = x · scale is y / (1 + 2^exponent(x, scale))."""
