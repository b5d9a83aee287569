"""Rows as e4m3 numbers with a scale each, alone or after a gated activation: each input is read once.

Activations are in float32 and not rounded in between: the gated kernel has some 30 instructions an element, and does
not hide them behind its bytes (2.6 TB/s on an H200 at [16384, 14336], commit 67d022b; the others 3.1 at [16384, 4096]).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

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
    - `tile` (static): how a thread block takes rows; by default a row, and 28 to 56 elements a thread.
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
    act = ACTIVATIONS[activation]

    def product(refs: Refs, piece: Piece, rows: list[Array], loaded: list[list[Array]]) -> list[Array]:
        scales, *channels = refs
        for_gate, for_up = (ref[piece.columns] for ref in channels)
        found = []
        for row, (g, u) in zip(rows, loaded, strict=True):
            scale = scales[row]
            found.append(act(g * scale * for_gate) * (u * scale * for_up))
        return found

    scales = [row_scale, gate_scale, up_scale]
    numbers, scale = launch("gated_rows", [gate, up], scales, product, unchanged, tile, interpret)
    return numbers, scale


def _silu(x: Array) -> Array:
    return x / (1 + jnp.exp2(-LOG2_E * x))


def _gelu(x: Array) -> Array:
    # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2y)), which keeps its precision where it is small.
    return x / (1 + jnp.exp2(-2 * LOG2_E * 0.7978845608 * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {"silu": _silu, "gelu": _gelu}
"""Activations of float32 numbers, inside kernels."""
