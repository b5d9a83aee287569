"""In which order thread blocks take query tiles of unequal work: the few longest first, the others as they lie."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Int

from pallas_kernels.device import Device, multiprocessors
from pallas_kernels.tracing import without_axes

WARPS, AT_ONCE = 16, 8_192
"""Of the kernel's only thread block, and how many tiles it holds at once."""


def longest_first(steps: Int[Array, "z i"]) -> Int[Array, " w"]:
    """The usual order, but first those query tiles that take over a sixteenth of a multiprocessor's whole work.

    Lists of blocks differ much in length: those of the last rows of a prompt may hold every key. Such a tile begun last
    keeps one multiprocessor busy while the others have nothing left. The rest keep their order, in which those of one
    head follow each other and find its keys in the L2 cache.

    **Arguments:** `steps`: of each head's query tiles.

    **Returns:** int32, places among all heads' tiles, the heads one after the other and each one's tiles from the last
    to the first.
    """
    steps = steps[:, ::-1].reshape(-1)
    if Device.default().platform != "gpu":
        return in_jnp(steps)
    return jax.lax.platform_dependent(steps, cuda=without_axes(in_one_block), default=in_jnp)


def in_jnp(steps: Int[Array, " w"]) -> Int[Array, " w"]:
    """`longest_first` of tiles in the usual order, anywhere. A GPU takes six launches for it."""
    long = _long(steps, steps.sum(dtype=jnp.int32))
    longs = jnp.cumsum(long, dtype=jnp.int32)
    index = jnp.arange(steps.size, dtype=jnp.int32)
    place = jnp.where(long, longs - 1, longs[-1] + index - longs)
    return jnp.zeros_like(steps).at[place].set(index, unique_indices=True)


def in_one_block(steps: Int[Array, " w"], *, at_once: int = AT_ONCE, interpret: bool = False) -> Int[Array, " w"]:
    """The same as a kernel of one thread block: thrice over the tiles, `at_once` (static) at a time."""
    size = steps.size
    some = min(pl.next_power_of_2(size), at_once)
    rounds = pl.cdiv(size, some)

    def kernel(steps_ref, order_ref):
        def at(turn: Any) -> tuple[Array, Array, Array]:
            index = turn * some + jnp.arange(some, dtype=jnp.int32)
            inside = index < size
            return index, inside, plgpu.load(steps_ref.at[index], mask=inside, other=0)

        def add(turn: Any, total: Array) -> Array:
            return total + at(turn)[2].sum()

        total = jax.lax.fori_loop(0, rounds, add, jnp.int32(0))

        def count(turn: Any, longs: Array) -> Array:
            return longs + _long(at(turn)[2], total).astype(jnp.int32).sum()

        longs = jax.lax.fori_loop(0, rounds, count, jnp.int32(0))

        def put(turn: Any, before: Array) -> Array:
            index, inside, found = at(turn)
            long = _long(found, total).astype(jnp.int32)
            up_to = before + jnp.cumsum(long)
            place = jnp.where(long > 0, up_to - 1, longs + index - up_to)
            plgpu.store(order_ref.at[place], index, mask=inside)
            return before + long.sum()

        jax.lax.fori_loop(0, rounds, put, jnp.int32(0))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((size,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="longest_first",
    )(steps)


def _long(steps: Int[Array, " w"], total: Int[Array, ""]) -> Bool[Array, " w"]:
    # Beyond 2**31 steps (64 heads that see every key of a million) the total is negative: the usual order results.
    return 16.0 * multiprocessors() * steps.astype(jnp.float32) > total.astype(jnp.float32)
