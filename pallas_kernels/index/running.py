"""Running sums between kernels, each by one thread block: of digits from the highest on, and of tied tiles in order.

The arrays are short, but a compiler makes a launch of each sum, comparison and level of a running sum. On a GPU a
launch takes as long as what each of them does. `minference_jax.index.level` has the same in jnp.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.sizes import KEY_TILE
from pallas_kernels.tracing import without_axes

WARPS = 16
AT_ONCE = 8_192
"""Most numbers that the thread block holds at once: 16 registers of each thread."""


def best_digit(
    counts: Int[Array, "b c d"] | Float[Array, "b c d"],
    most: Float[Array, " b"],
    above: Float[Array, " b"],
    prefix: Int[Array, " b"] | None = None,
    *,
    highest: int | None = None,
    interpret: bool = False,
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """The highest digit whose cells, with those of higher digits and `above`, are more than `most`; 0 if there is none.

    **Arguments:** `counts`: cells of each digit, in parts that are added up; d a power of two. `prefix`: the
    bits before the digit; None for 0. `highest` (static): the most that both together may be. `interpret` (static): run
    the kernel on a CPU, for tests.

    **Returns:** the digit, with the bits before it, and the cells of all higher digits and `above`.
    """
    b, parts, digits = counts.shape
    some = min(pl.next_power_of_2(parts), max(1, 2 * AT_ONCE // digits))

    def kernel(counts_ref, most_ref, above_ref, *refs):
        *prefix_ref, digit_ref, beyond_ref = refs
        batch = pl.program_id(0)
        digit = digits - 1 - jnp.arange(digits, dtype=jnp.int32)  # descending: running sums go forward

        def add(step: Any, cells: Array) -> Array:
            part = step * some + jnp.arange(some, dtype=jnp.int32)[:, None]
            at = counts_ref.at[batch, jnp.broadcast_to(part, (some, digits)), jnp.broadcast_to(digit, (some, digits))]
            found = plgpu.load(at, mask=jnp.broadcast_to(part < parts, (some, digits)), other=0)
            return cells + found.astype(jnp.float32).sum(0)

        cells = jax.lax.fori_loop(0, pl.cdiv(parts, some), add, jnp.zeros((digits,), jnp.float32))
        reached = jnp.cumsum(cells) + above_ref[batch]
        best = jnp.sum(((reached > most_ref[batch]) & (digit > 0)).astype(jnp.int32))
        found = best + digits * prefix_ref[0][batch] if prefix_ref else best
        digit_ref[batch] = found if highest is None else jnp.minimum(found, highest)
        beyond_ref[batch] = jnp.max(jnp.where(digit > best, reached, above_ref[batch]))

    digit, beyond = _in_one_block(kernel, b, [((b,), jnp.int32), ((b,), jnp.float32)], "best_digit", interpret)(
        counts, most, above, *(() if prefix is None else (prefix,))
    )
    return digit, beyond


def tied_tiles(
    above: Int[Array, "b n i"],
    reached: Int[Array, "b n i"],
    rows: Int[Array, "b i"],
    most: Float[Array, " b"],
    *,
    unit: int,
    width: int,
    interpret: bool = False,
) -> Int[Array, "b n i"]:
    """How many of the tiles at the level each query tile takes: in order, as long as they fit with all above it.

    **Arguments:** `above`, `reached`: what of each query tile's tiles is above the level, and at it or above; `unit`
    (static) times `rows` are the cells of each of them. `most`: cells of all. `width` (static): stands for all tiles.
    `interpret` (static): as above.
    """
    b, heads, tiles = above.shape
    size, some = heads * tiles, min(pl.next_power_of_2(heads * tiles), AT_ONCE)
    steps = pl.cdiv(size, some)

    def kernel(above_ref, reached_ref, rows_ref, most_ref, ties_ref):
        batch = pl.program_id(0)

        def cells_of(step: Any) -> tuple[Array, Array, Array, Array]:
            place = step * some + jnp.arange(some, dtype=jnp.int32)
            inside = place < size
            high, all_ = (plgpu.load(ref.at[batch, place], mask=inside, other=0) for ref in (above_ref, reached_ref))
            height = plgpu.load(rows_ref.at[batch, jax.lax.rem(place, tiles)], mask=inside, other=0)
            cells = unit * height.astype(jnp.float32)
            return place, height, high.astype(jnp.float32) * cells, (all_ - high).astype(jnp.float32) * cells

        def add(step: Any, total: Array) -> Array:
            return total + cells_of(step)[2].sum()

        def take(step: Any, left: Array) -> Array:
            place, height, _, tied = cells_of(step)
            after = jnp.cumsum(tied)
            mine = left - (after - tied)
            fitting = jnp.floor(mine / jnp.maximum(KEY_TILE * height, 1).astype(jnp.float32))
            ties = jnp.where(tied <= mine, width, jnp.clip(fitting, 0, width)).astype(jnp.int32)
            plgpu.store(ties_ref.at[batch, place], ties, mask=place < size)
            return left - tied.sum()

        left = most_ref[batch] - jax.lax.fori_loop(0, steps, add, jnp.float32(0))
        jax.lax.fori_loop(0, steps, take, left)

    flat = [x.reshape(b, size) for x in (above, reached)]
    (ties,) = _in_one_block(kernel, b, [((b, size), jnp.int32)], "tied_tiles", interpret)(*flat, rows, most)
    return ties.reshape(above.shape)


def _in_one_block(kernel: Any, b: int, results: list[tuple[tuple[int, ...], Any]], name: str, interpret: bool) -> Any:
    """The kernel as a call: a thread block a sequence."""
    return without_axes(
        pl.pallas_call(
            kernel,
            grid=(b,),
            out_shape=[jax.ShapeDtypeStruct(*x) for x in results],
            compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
            interpret=interpret,
            name=name,
        )
    )
