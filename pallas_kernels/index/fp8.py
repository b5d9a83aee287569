"""Probes and keys in FP8 (e4m3), whose products take half the time of 16-bit ones.

e4m3 numbers are exact to a sixteenth, which is too little for scores of a hundred. But keys that stand side by side
have much in common, and so have their scores: keys are rounded after the mean of their group is taken away
(SageAttention takes away that of all keys, arXiv 2410.02367), and what the mean gives a probe is computed from 16-bit
numbers. On queries and keys of Qwen2.5-Coder-0.5B (a novel of 8,192 tokens, seven layers, a fifth of all tiles) tiles
chosen so hold within .04 % of the attention of those chosen exactly; with rounded keys as they are up to 5 % less.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Float32, Int

from pallas_kernels.decode.addresses import wraps
from pallas_kernels.index.tile_lse import GROUP, Factors
from pallas_kernels.rows.launch import DTYPE, LARGEST
from pallas_kernels.tracing import without_axes

FEWEST = 2_048
"""Fewest probes of a query head for which they and the keys are rounded. On an H200 with 128K tokens rounding took
.15 ms for the keys (commit b8bc641), and .6 ms less was spent on 2,048 probes of each of four heads that share them. By
arithmetic it comes out even without sharing, and a few rows behind a long cache would lose. How many heads share keys
does not count, because fewer do on each device of a mesh, which is to choose the same tiles."""

_SMALLEST = 1e-20
"""Smaller numbers count as this large: what is divided by them stays finite."""

WIDEST = 128
"""Most head dimensions: a group of keys fills a multiprocessor's registers to the half."""

_KEYS, _KEY_WARPS = 16, 16
"""Keys that a thread block works on at once, and its warps. On an H200 it took 145 us for 128K keys of 8 heads and 128
dimensions, with 8 warps 153, with 32 keys 166; one that reads keys twice, instead of keeping them, 179 (b8bc641)."""

_PROBES, _GROUPS, _PROBE_WARPS = 64, 32, 4
"""Probes of a thread block, and groups of keys whose means it multiplies with them at once."""


def pays_in_fp8(q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], probes: int) -> bool:
    """Whether the kernels can round these keys and so many probes of each query head, and that is worth it."""
    b, _, n, h = q.shape
    wrapped = wraps(DTYPE, k.size) or wraps(DTYPE, b * n * probes * h)
    return k.dtype == jnp.bfloat16 and h <= WIDEST and probes >= FEWEST and not wrapped


def in_fp8(
    q: BFloat16[Array, "b t n h"],
    k: BFloat16[Array, "b s k h"],
    rows: Int[Array, "b i p"],
    positions: Int[Array, "b i p"],
    *,
    interpret: bool = False,
) -> tuple[Float8e4m3fn[Array, "b k r h"], Float8e4m3fn[Array, "b s k h"], Factors]:
    """Probes in the order of `packed` and keys, rounded, with the factors that `tile_lse` takes.

    **Arguments:** `rows`, `positions`: of the probes of each query tile, and the last key that each sees, -1 for one
    that is none. Keys after all of them are not looked at. `interpret` (static): run the kernels on a CPU, for tests.
    """
    keys, means, of_keys = centred_keys(k, positions.max((1, 2)) + 1, interpret=interpret)
    probes, of_rows, shift = rounded_probes(q, means, rows, positions, interpret=interpret)
    return probes, keys, Factors(of_rows, of_keys, shift)


def centred_keys(
    k: BFloat16[Array, "b s k h"], end: Int[Array, " b"], *, interpret: bool = False
) -> tuple[Float8e4m3fn[Array, "b s k h"], BFloat16[Array, "b g k h"], Float32[Array, "b k g"]]:
    """Keys less the mean of their group, divided by a factor of the group and head that leaves at most 448.

    **Arguments:** `k`: h at most `WIDEST`.

    **Returns:** the numbers, without meaning from key `end` on; the means; the factors. A NaN makes all of its group
    and head NaN.
    """
    b, s, kv_heads, h = k.shape
    groups, width = pl.cdiv(s, GROUP), pl.next_power_of_2(h)
    shape = (_KEYS, width)

    def kernel(k_ref, end_ref, keys_ref, means_ref, factors_ref):
        head, group, batch = (pl.program_id(axis) for axis in range(3))  # heads that lie side by side together
        first = group * GROUP
        inside = jnp.clip(jnp.minimum(end_ref[batch], s) - first, 0, GROUP)
        column = jnp.arange(width, dtype=jnp.int32)
        real = None if width == h else column < h  # a mask that differs between columns makes loads narrow

        def place(part: int, limit: Any) -> tuple[Any, Array]:
            """Where some keys are, and which of them lie before the limit."""
            row = part * _KEYS + jnp.arange(_KEYS, dtype=jnp.int32)[:, None]
            there = jnp.broadcast_to(row < limit, shape)
            at = batch, jnp.broadcast_to(first + row, shape), head, jnp.broadcast_to(column, shape)
            return at, there if real is None else there & real

        parts = range(GROUP // _KEYS)
        places = [place(part, inside) for part in parts]
        loaded = [plgpu.load(k_ref.at[at], mask=there, other=0) for at, there in places]
        # Zero is loaded where there is no key: the largest of a last group may come out larger, which costs range.
        total, low, high = (jnp.full(shape, x, jnp.float32) for x in (0, jnp.inf, -jnp.inf))
        for x in loaded:
            x = x.astype(jnp.float32)
            total, low, high = total + x, jnp.minimum(low, x), jnp.maximum(high, x)
        mean = (total.sum(0) / jnp.maximum(inside, 1).astype(jnp.float32)).astype(k_ref.dtype)
        plgpu.store(means_ref.at[batch, group, head, column], mean, mask=real)
        mean = mean.astype(jnp.float32)
        largest = jnp.max(jnp.maximum(high.max(0) - mean, mean - low.min(0)))
        factor = jnp.maximum(largest, _SMALLEST) / LARGEST
        factors_ref[batch, head, group] = factor
        inverse = 1 / factor
        mean = jnp.broadcast_to(mean[None, :], shape)
        for part, x in zip(parts, loaded, strict=True):
            at, there = place(part, s - first)
            # One operation for both would leave a rest where all keys of a group are the same.
            difference = _widened(x, inverse, interpret) - mean
            plgpu.store(keys_ref.at[at], (difference * inverse).astype(DTYPE), mask=there)

    return without_axes(
        pl.pallas_call(
            kernel,
            grid=(kv_heads, groups, b),
            out_shape=(
                jax.ShapeDtypeStruct(k.shape, DTYPE),
                jax.ShapeDtypeStruct((b, groups, kv_heads, h), k.dtype),
                jax.ShapeDtypeStruct((b, kv_heads, groups), jnp.float32),
            ),
            compiler_params=plgpu.CompilerParams(num_warps=_KEY_WARPS, num_stages=1),
            interpret=interpret,
            name="centred_keys",
        )
    )(k, end)


def _widened(x: BFloat16[Array, "s h"], after: Float32[Array, ""], interpret: bool) -> Float32[Array, "s h"]:
    """x in float32, but not before `after` is known: the compiler would keep what it has widened already, in twice as
    many registers."""
    if interpret:
        return x.astype(jnp.float32)
    (wide,) = plgpu.elementwise_inline_asm(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
        args=[x, jnp.broadcast_to(after, x.shape)],
        constraints="=r,=r,r,f,f",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return wide


def rounded_probes(
    q: BFloat16[Array, "b t n h"],
    means: BFloat16[Array, "b g k h"],
    rows: Int[Array, "b i p"],
    positions: Int[Array, "b i p"],
    *,
    interpret: bool = False,
) -> tuple[Float8e4m3fn[Array, "b k r h"], Float32[Array, "b k r"], Float32[Array, "b k g r"]]:
    """Probes divided by factors that leave 448 as the largest number of each; the factors; products with the means.

    Products are undefined for groups that a probe does not see, and for probes that are none.
    """
    (b, t, n, h), (_, groups, kv_heads, _), per_tile = q.shape, means.shape, rows.shape[2]
    heads, width = n // kv_heads, pl.next_power_of_2(h)
    count = rows.shape[1] * heads * per_tile
    shape = (_PROBES, width)

    def kernel(q_ref, means_ref, rows_ref, positions_ref, probes_ref, factors_ref, shift_ref):
        block, kv_head, batch = (pl.program_id(axis) for axis in range(3))
        probe = block * _PROBES + jnp.arange(_PROBES, dtype=jnp.int32)
        there = probe < count
        tile, member = jax.lax.div(probe, heads * per_tile), jax.lax.rem(jax.lax.div(probe, per_tile), heads)
        of_tile = batch, tile, jax.lax.rem(probe, per_tile)
        row = jnp.clip(plgpu.load(rows_ref.at[of_tile], mask=there, other=0), 0, t - 1)
        last = jnp.max(plgpu.load(positions_ref.at[of_tile], mask=there, other=-1))
        column = jnp.arange(width, dtype=jnp.int32)
        mask = jnp.broadcast_to(there[:, None], shape)
        real = None if width == h else column < h
        mask = mask if real is None else mask & real

        def whole(x: Array, axis: int) -> Array:
            return jnp.broadcast_to(jnp.expand_dims(x, axis), shape)

        at = batch, whole(row, 1), whole(kv_head * heads + member, 1), whole(column, 0)
        x = plgpu.load(q_ref.at[at], mask=mask, other=0)
        wide = x.astype(jnp.float32)
        factor = jnp.maximum(jnp.abs(wide).max(1), _SMALLEST) / LARGEST
        rounded = (wide * (1 / factor)[:, None]).astype(DTYPE)
        plgpu.store(probes_ref.at[batch, kv_head, whole(probe, 1), whole(column, 0)], rounded, mask=mask)
        plgpu.store(factors_ref.at[batch, kv_head, probe], factor, mask=there)

        def multiply(step: Any, _: None) -> None:
            group = step * _GROUPS + jnp.arange(_GROUPS, dtype=jnp.int32)[:, None]
            of_keys, of_probes = (_GROUPS, width), (_GROUPS, _PROBES)
            known = jnp.broadcast_to(group < groups, of_keys)
            at = batch, jnp.broadcast_to(group, of_keys), kv_head, jnp.broadcast_to(column, of_keys)
            mean = plgpu.load(means_ref.at[at], mask=known if real is None else known & real, other=0)
            found = jax.lax.dot_general(mean, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            at = batch, kv_head, jnp.broadcast_to(group, of_probes), jnp.broadcast_to(probe, of_probes)
            plgpu.store(shift_ref.at[at], found, mask=(group < groups) & there)

        jax.lax.fori_loop(0, pl.cdiv(last + 1, _GROUPS * GROUP), multiply, None)

    return without_axes(
        pl.pallas_call(
            kernel,
            grid=(pl.cdiv(count, _PROBES), kv_heads, b),
            out_shape=(
                jax.ShapeDtypeStruct((b, kv_heads, count, h), DTYPE),
                jax.ShapeDtypeStruct((b, kv_heads, count), jnp.float32),
                jax.ShapeDtypeStruct((b, kv_heads, groups, count), jnp.float32),
            ),
            compiler_params=plgpu.CompilerParams(num_warps=_PROBE_WARPS, num_stages=1),
            interpret=interpret,
            name="rounded_probes",
        )
    )(q, means, rows, positions)
