"""What the softmax does within registers, where a warpgroup's array is split among its threads.

Hopper's special function units compute 16 exponentials a clock on each multiprocessor. At head_dim 64 that takes as
long as the matrix products; a polynomial of degree 3 is as exact as 16-bit probabilities need, and runs beside them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxtyping import Array, Float

SUM_COLUMNS = 8
"""Columns of a running sum: the fewest that need no exchange between threads."""

_TILE = SUM_COLUMNS
_SMALLEST = -126.0  # 2**-126 is the smallest normal number; everything below it counts as that
_ROUND = 1.5 * 2**23  # adding this to a small number leaves it rounded in the lowest bits
_FACTORS = (
    0.9999280571937561,
    0.6932609677314758,
    0.2426111251115799,
    0.0551716685295105,
)  # of 2**f, |f| <= 1/2; largest relative error 1e-4


def exp2(x: Float[Array, "m s"], polynomial_tiles: int, *, emulate: bool) -> Float[Array, "m s"]:
    """2**x for x <= 0, in `polynomial_tiles` of every 16 tiles of 8 columns as a polynomial."""
    tiles = x.shape[1] // _TILE
    count = polynomial_tiles * tiles // 16
    if not count:
        return jnp.exp2(x)
    if emulate:
        tile = lax.div(lax.broadcasted_iota(jnp.int32, x.shape, 1), jnp.int32(_TILE))
        return jnp.where(lax.rem(tile * count, jnp.int32(tiles)) < count, _polynomial(x), jnp.exp2(x))
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout))
    def mixed(_, x):
        result = x.copy()
        for tile in range(tiles):
            columns = slice(tile * _TILE, (tile + 1) * _TILE)
            part = x[:, columns]
            result[:, columns] = _polynomial_registers(part) if tile * count % tiles < count else part.exp2(approx=True)
        return result

    return mixed(x)  # pyright: ignore[reportCallIssue]


def folded(p: Float[Array, "m s"], *, emulate: bool) -> Float[Array, "m SUM_COLUMNS"]:
    """Sums over every eighth column: additions within each thread. The exchange between threads is left for later."""
    if emulate:
        return p.reshape(p.shape[0], -1, _TILE).sum(1)
    layout = plgpu.Layout.WGMMA
    shape = (p.shape[0], _TILE)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout))
    def fold(_, p):
        parts = [p[:, i : i + _TILE] for i in range(0, p.shape[1], _TILE)]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    return fold(p)  # pyright: ignore[reportCallIssue]


def _polynomial_registers(x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    int32, float32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    x = x.max(_SMALLEST)
    rounded = x + _ROUND
    rest = x - (rounded - _ROUND)
    total = rest * _FACTORS[3] + _FACTORS[2]
    for factor in _FACTORS[1::-1]:
        total = total * rest + factor
    # The whole part goes into the exponent.
    bits = total.bitcast(int32, output_is_signed=True) + (rounded.bitcast(int32, output_is_signed=True) << 23)
    return bits.bitcast(float32)


def _polynomial(x: Float[Array, "m s"]) -> Float[Array, "m s"]:
    """The same in jnp, for the interpreter."""
    x = jnp.maximum(x, _SMALLEST)
    whole = jnp.round(x)
    rest = x - whole
    total = rest * _FACTORS[3] + _FACTORS[2]
    for factor in _FACTORS[1::-1]:
        total = total * rest + factor
    return total * jnp.exp2(whole)
