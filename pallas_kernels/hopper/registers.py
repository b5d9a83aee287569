"""What the softmax does within registers, where a warpgroup's array is split among its threads.

Hopper's special function units compute 16 exponentials a clock on each multiprocessor. At head_dim 64 that takes as
long as the matrix products; a polynomial of degree 3 is as exact as 16-bit probabilities need, and runs beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf, vector
from jaxtyping import Array, Float

SUM_COLUMNS = 8
"""Columns of a running sum: the fewest that need no exchange between threads."""

LARGEST_GROWTH = 8.0
"""The running maximum of a row follows its scores only when they exceed it by more, in powers of two. Until then
probabilities reach 256, which 16-bit floats and float32 sums hold as exactly, and nothing has to be rescaled."""

_TILE = SUM_COLUMNS
SMALLEST = -126.0  # 2**-126 is the smallest normal number; everything below it counts as that
ROUND = 1.5 * 2**23  # adding this to a small number leaves it rounded in the lowest bits
FACTORS = (
    0.9999280571937561,
    0.6932609677314758,
    0.2426111251115799,
    0.0551716685295105,
)  # of 2**f, |f| <= 1/2; largest relative error 1e-4


def exp2(x: Float[Array, "m s"], polynomial_tiles: int, *, emulate: bool) -> Float[Array, "m s"]:
    """2**x for x <= 127, in `polynomial_tiles` of every 16 tiles of 8 columns as a polynomial."""
    tiles = x.shape[1] // _TILE
    count = polynomial_tiles * tiles // 16
    if not count:
        return jnp.exp2(x)
    if emulate:
        tile = lax.div(lax.broadcasted_iota(jnp.int32, x.shape, 1), jnp.int32(_TILE))
        return jnp.where(lax.rem(tile * count, jnp.int32(tiles)) < count, polynomial(x), jnp.exp2(x))
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout))
    def mixed(_, x):
        result = x.copy()
        for tile in range(tiles):
            columns = slice(tile * _TILE, (tile + 1) * _TILE)
            part = x[:, columns]
            if tile * count % tiles < count:
                result[:, columns] = _polynomial_registers(part)
            else:
                result[:, columns] = part.exp2(approx=True)
        return result

    return mixed(x)  # pyright: ignore[reportCallIssue]


def raised(maximum: Float[Array, " m"], s: Float[Array, "m w"], scale: float, *, emulate: bool) -> Float[Array, " m"]:
    """The running maxima, raised to those of s · scale in the warps where a row exceeds its own by `LARGEST_GROWTH`."""
    if emulate:
        largest = s.max(axis=1) * scale
        return jnp.where(largest > maximum + LARGEST_GROWTH, largest, maximum)
    layout = plgpu.Layout.WGMMA
    rows = layout.reduce(1)
    result = plgpu.ShapeDtypeStruct(maximum.shape, jnp.float32, layout=rows)

    @plgpu.inline_mgpu(arg_types=(rows, layout), return_type=result)
    def raise_maximum(_, maximum, s):
        largest = halved(s, lambda a, b: a.max(b)) * scale
        growth = largest - maximum.broadcast_in_dim(largest.shape, (0,), largest.layout)
        (raised,) = _in_warps_where(
            _any_above(growth, LARGEST_GROWTH), [maximum], lambda m: [m.max(largest.reduce("max", 1))]
        )
        return raised

    return raise_maximum(maximum, s)  # pyright: ignore[reportCallIssue]


def rescaled(
    sums: tuple[Float[Array, "m _"], ...], before: Float[Array, " m"], after: Float[Array, " m"], *, emulate: bool
) -> tuple[Float[Array, "m _"], ...]:
    """Sums relative to the maxima `before`, made relative to `after`. Warps where none was raised do nothing."""
    if emulate:
        factor = jnp.exp2(before - after)[:, None]
        return tuple(x * factor for x in sums)
    layout = plgpu.Layout.WGMMA
    rows = layout.reduce(1)
    results = tuple(plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout) for x in sums)

    @plgpu.inline_mgpu(arg_types=((layout,) * len(sums), rows, rows), return_type=results)
    def rescale(_, sums, before, after):
        def scale(*sums):
            factor = (before - after).exp2(approx=True)
            return [x * factor.broadcast_in_dim(x.shape, (0,), x.layout) for x in sums]

        return tuple(_in_warps_where(_any_above(after - before, 0.0), list(sums), scale))

    return rescale(sums, before, after)  # pyright: ignore[reportCallIssue]


def folded(p: Float[Array, "m s"], *, emulate: bool) -> Float[Array, "m SUM_COLUMNS"]:
    """Sums over every eighth column: additions within each thread. The exchange between threads is left for later."""
    if emulate:
        return p.reshape(p.shape[0], -1, _TILE).sum(1)
    layout = plgpu.Layout.WGMMA
    shape = (p.shape[0], _TILE)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout))
    def fold(_, p):
        return halved(p, lambda a, b: a + b)

    return fold(p)  # pyright: ignore[reportCallIssue]


def halved(x: mgpu.FragmentedArray, combine: Callable[[Any, Any], Any]) -> mgpu.FragmentedArray:
    """Tiles of `_TILE` columns combined pairwise until one is left."""
    parts = [x[:, i : i + _TILE] for i in range(0, x.shape[1], _TILE)]
    while len(parts) > 1:
        parts = [combine(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _any_above(x: mgpu.FragmentedArray, limit: float) -> ir.Value:
    """Whether an element that one of the warp's threads holds is greater than `limit`: one answer for each warp.

    NaN is not greater than anything, and hides no other element.
    """
    largest = functools.reduce(arith.maxnumf, numbers(x))
    above = arith.cmpf(arith.CmpFPredicate.OGT, largest, arith.constant(ir.F32Type.get(), limit))
    return nvvm.vote_sync(arith.constant(ir.IntegerType.get_signless(32), -1), above, "any")


def _in_warps_where(
    predicate: ir.Value,
    arrays: list[mgpu.FragmentedArray],
    function: Callable[..., list[mgpu.FragmentedArray]],
) -> list[mgpu.FragmentedArray]:
    """function(*arrays), of the same shapes and layouts, in warps where the predicate holds; else the arrays."""
    flat = [number for x in arrays for number in numbers(x)]
    branch = scf.IfOp(predicate, [number.type for number in flat], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_([number for x in function(*arrays) for number in numbers(x)])
    with ir.InsertionPoint(branch.else_block):  # pyright: ignore[reportCallIssue, reportArgumentType]
        scf.yield_(flat)
    results = iter(branch.results)
    return [with_numbers(x, results) for x in arrays]


def numbers(x: mgpu.FragmentedArray) -> list[ir.Value]:
    """The elements that each thread holds, one by one."""
    found = []
    for register in x.registers.flat:
        places = range(ir.VectorType(register.type).shape[0]) if isinstance(register.type, ir.VectorType) else None
        if places is None:
            found.append(register)
        else:
            at = [ir.DenseI64ArrayAttr.get([i]) for i in places]
            found += [vector.extract(register, dynamic_position=[], static_position=i) for i in at]
    return found


def with_numbers(x: mgpu.FragmentedArray, values: Iterator[ir.Value]) -> mgpu.FragmentedArray:
    """An array of x's layout that holds these elements."""
    registers, kind = x.tree_flatten()
    made = []
    for register in registers:
        if isinstance(register.type, ir.VectorType):
            size = ir.VectorType(register.type).shape[0]
            made.append(vector.from_elements(register.type, [next(values) for _ in range(size)]))
        else:
            made.append(next(values))
    return x.tree_unflatten(kind, made)


def _polynomial_registers(x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    int32, float32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    x = x.max(SMALLEST)
    rounded = x + ROUND
    rest = x - (rounded - ROUND)
    total = rest * FACTORS[3] + FACTORS[2]
    for factor in FACTORS[1::-1]:
        total = total * rest + factor
    # The whole part goes into the exponent.
    bits = total.bitcast(int32, output_is_signed=True) + (rounded.bitcast(int32, output_is_signed=True) << 23)
    return bits.bitcast(float32)


def polynomial(x: Float[Array, "m s"]) -> Float[Array, "m s"]:
    """What it is in jnp, for the interpreter."""
    x = jnp.maximum(x, SMALLEST)
    whole = jnp.round(x)
    rest = x - whole
    total = rest * FACTORS[3] + FACTORS[2]
    for factor in FACTORS[1::-1]:
        total = total * rest + factor
    return total * jnp.exp2(whole)
