"""Softmax terms of key tiles within registers, where a warpgroup's scores are split among its threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper.registers import FACTORS, ROUND, SMALLEST, halved, numbers, polynomial, with_numbers

TILES = 8
"""Key tiles, or columns, of which each thread of a row has two."""

_LARGEST = 127.0
_RANGE = _LARGEST - SMALLEST


def exponentials(
    s: Float[Array, "m s"],
    factor: float | Float[Array, " m"],
    top: Float[Array, " m"],
    polynomial_tiles: int,
    last: Int[Array, " m"] | None = None,
    *,
    emulate: bool,
) -> Float[Array, "m s"]:
    """2**(s · factor − top), in `polynomial_tiles` of every 16 tiles of 8 columns as a polynomial.

    Polynomials of exponents outside [-126, 127] are those of the nearer end, of NaN those of -126; other exponentials
    are zero, infinite or NaN.
    With `last`, columns after last[row] count as exponents far below that range, whatever s holds there.
    """
    tiles = s.shape[1] // TILES
    count = polynomial_tiles * tiles // 16
    if emulate or (not count and last is None):
        slope: Any = factor if isinstance(factor, float) else _in_columns(factor, s.shape)
        x = s * slope - _in_columns(top, s.shape)
        if last is not None:
            x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) <= last[:, None], x, -jnp.inf)
        if not count:
            return jnp.exp2(x)
        tile = lax.div(lax.broadcasted_iota(jnp.int32, x.shape, 1), jnp.int32(TILES))
        clipped = lax.rem(tile * count, jnp.int32(tiles)) < count
        return jnp.where(clipped, polynomial(jnp.minimum(x, _LARGEST)), jnp.exp2(x))
    layout = plgpu.Layout.WGMMA
    rows = layout.reduce(1)
    of_rows = [x for x in (top, factor, last) if not isinstance(x, float | None)]

    @plgpu.inline_mgpu(
        arg_types=(layout,) + (rows,) * len(of_rows),
        return_type=plgpu.ShapeDtypeStruct(s.shape, jnp.float32, layout=layout),
    )
    def mixed(_, s, top, *others):
        others = list(others)
        shape = (s.shape[0], TILES)

        def in_columns(x):
            return x.broadcast_in_dim(shape, (0,), s.layout)

        def constant(x):
            return mgpu.FragmentedArray.splat(mgpu.c(x, ir.F32Type.get()), shape, s.layout)

        slope = constant(factor) if isinstance(factor, float) else in_columns(others.pop(0))
        start = in_columns(top) * -1.0
        # Exponents in the range become numbers in [0, 1], to which an addition clips at no cost.
        clipped_slope, clipped_start = slope * (1 / _RANGE), (start + -SMALLEST) * (1 / _RANGE)
        ahead = None if last is None else _columns_left(others.pop(), shape, s.layout)
        result = s.copy()
        for tile in range(tiles):
            columns = slice(tile * TILES, (tile + 1) * TILES)
            clipped = tile * count % tiles < count
            x = _multiply_add(
                s[:, columns],
                *((clipped_slope, clipped_start) if clipped else (slope, start)),
                ".sat" if clipped else "",
            )
            if ahead is not None:
                x = (ahead >= tile * TILES).select(x, constant(0.0 if clipped else -jnp.inf))
            result[:, columns] = _polynomial_registers(x) if clipped else x.exp2(approx=True)
        return result

    return mixed(s, *of_rows)  # pyright: ignore[reportCallIssue]


def hidden_after(
    x: Float[Array, "m s"], last: Int[Array, " m"], hidden: float, *, emulate: bool
) -> Float[Array, "m s"]:
    """x up to column last[row] of each row, `hidden` after it."""
    if emulate:
        return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) <= last[:, None], x, hidden)
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout.reduce(1)), return_type=result)
    def hide(_, x, last):
        shape = (x.shape[0], TILES)
        ahead = _columns_left(last, shape, x.layout)
        nothing = mgpu.FragmentedArray.splat(mgpu.c(hidden, ir.F32Type.get()), shape, x.layout)
        result = x.copy()
        for first in range(0, x.shape[1], TILES):
            columns = slice(first, first + TILES)
            result[:, columns] = (ahead >= first).select(x[:, columns], nothing)
        return result

    return hide(x, last)  # pyright: ignore[reportCallIssue]


def tile_parts(p: Float[Array, "m s"], *, emulate: bool) -> Float[Array, "m TILES"]:
    """Sums over the columns of two tiles, the halves of p, of what each thread holds: for `tile_sums` to add up."""
    half = p.shape[1] // 2
    if emulate:
        return jnp.pad(p.reshape(p.shape[0], 2, half).sum(2), ((0, 0), (0, TILES - 2)))
    layout = plgpu.Layout.WGMMA
    shape = (p.shape[0], TILES)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout))
    def add(_, p):
        tiles = [halved(p[:, first : first + half], lambda a, b: a + b) for first in (0, half)]
        pairs = [numbers(x) for x in tiles]  # of each of a thread's rows two neighbours
        sums = [arith.addf(x[i], x[i + 1]) for i in range(0, len(pairs[0]), 2) for x in pairs]
        return with_numbers(tiles[0], iter(sums))

    return add(p)  # pyright: ignore[reportCallIssue]


def tile_sums(parts: Sequence[Float[Array, "m TILES"]], *, emulate: bool) -> Float[Array, "m TILES"]:
    """Sums over the columns of four pairs of tiles, from the `tile_parts` of each.

    Of the four threads that share a row each needs two sums. So it sends others what they need, which takes a third of
    the messages of a sum that all four have.
    """
    if emulate:
        return jnp.concatenate([x[:, :2] for x in parts], 1)
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(parts[0].shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * len(parts), return_type=result)
    def scatter(_, *given):
        of_parts = [numbers(x) for x in given]  # a row's two tiles after each other
        sums = []
        for row in range(0, len(of_parts[0]), 2):
            left = [x[row + i] for x in of_parts for i in range(2)]
            for distance in (2, 1):  # the upper half of the threads needs the upper half of the sums
                upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(mgpu.utils.thread_idx(), _int(distance)), _int(0))
                pairs = list(zip(left[: len(left) // 2], left[len(left) // 2 :], strict=True))
                sent = [mgpu.utils.shfl_bfly(arith.select(upper, low, high), distance) for low, high in pairs]
                kept = [arith.select(upper, high, low) for low, high in pairs]
                left = [arith.addf(a, b) for a, b in zip(kept, sent, strict=True)]
            sums += left
        return with_numbers(given[0], iter(sums))

    return scatter(*parts)  # pyright: ignore[reportCallIssue, reportReturnType]


def _int(x: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(32), x)


def _in_columns(x: Any, shape: tuple[int, ...]) -> Float[Array, "m s"]:
    return lax.broadcast_in_dim(x, shape, [0])


def _columns_left(last: mgpu.FragmentedArray, shape: tuple[int, int], layout: Any) -> mgpu.FragmentedArray:
    """last[row] − column for the first columns of an array, to be compared with the number of further ones.

    A thread compares these few with constants: one for each element would take as many registers as the array.
    """
    column = mgpu.FragmentedArray.broadcasted_iota(last.mlir_dtype, shape, 1, layout, is_signed=True)
    return last.broadcast_in_dim(shape, (0,), layout) - column


def _multiply_add(
    x: mgpu.FragmentedArray, factor: mgpu.FragmentedArray, start: mgpu.FragmentedArray, suffix: str
) -> mgpu.FragmentedArray:
    """x · factor + start in one instruction, whatever is done with the result; with ".sat" clipped to [0, 1]."""
    instruction = f"fma.rn.ftz{suffix}.f32 $0, $1, $2, $3;"
    terms = zip(numbers(x), numbers(factor), numbers(start), strict=True)
    found = [llvm.inline_asm(ir.F32Type.get(), list(of_one), instruction, "=f,f,f,f") for of_one in terms]
    return with_numbers(x, iter(found))


def _polynomial_registers(clipped: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """2**x for x = clipped · range + smallest."""
    int32, float32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    rounded = clipped * _RANGE + (ROUND + SMALLEST)
    rest = clipped * _RANGE + ((ROUND + SMALLEST) - rounded)
    total = rest * FACTORS[3] + FACTORS[2]
    for factor in FACTORS[1::-1]:
        total = total * rest + factor
    # The whole part goes into the exponent.
    bits = total.bitcast(int32, output_is_signed=True) + (rounded.bitcast(int32, output_is_signed=True) << 23)
    return bits.bitcast(float32)
