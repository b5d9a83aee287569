"""A few rows times one layer of stacked weights, read where they lie, in 16 bits or in FP8.

Decoding multiplies one row a sequence with every weight: it is bound by reading them. A compiler's matrix products want
an operand of their own, so a loop over layers first copies each layer's slice, and moves three bytes for one. This
kernel takes the stack and the layer's number, and all weights that share their input (queries, keys and values; gate
and up) in one launch. The summed axis is split over thread blocks, whose parts are added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Device

BLOCKS = 528
"""Thread blocks to aim at: four for each multiprocessor of an H100 or H200."""

ROWS = 16
"""Rows of a tensor-core product, and the most that a call may have."""


class Tile(NamedTuple):
    """How much of a weight a thread block loads at a time: summed and free indices; warps; loads in flight."""

    inside: int
    out: int
    warps: int
    stages: int


WIDE = Tile(64, 128, 8, 4), Tile(64, 64, 4, 4)
"""Of weights in 16 bits: the first one that divides all of a call's weights."""

NARROW = Tile(256, 64, 4, 3), Tile(64, 64, 4, 4)
"""The same of weights in FP8."""

DTYPE = jnp.dtype(jnp.float8_e4m3fn)


def stacked_matvec(
    x: Float[Array, "b i"],
    weights: Sequence[Float[Array, "layers ..."]],
    layer: Int[Array, ""],
    scales: Sequence[Float[Array, "layers _"]] = (),
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> list[Float[Array, "b o"]]:
    """A few rows times one layer of each of several stacked weights: `x @ weight[layer]`, for all weights in one
    launch.

    **Arguments:**

    - `x`: `[b, i]`, bfloat16 or float16, at most 16 rows.
    - `weights`: either all `[layers, i, o]` in x's dtype, or all float8_e4m3fn `[layers, o, i]`. i and each o are
      multiples of 64; o may differ from weight to weight.
    - `layer`: int32 scalar, may be traced.
    - `scales`: with float8 weights, float32 `[layers, o]` for each, what each output is to be multiplied with.
    - `tile` (static): how much a thread block loads at a time; by default the fastest that was measured.
    - `interpret` (static): run the kernel on a CPU, for tests.

    **Returns:** `[b, o]` in x's dtype for each weight, with float32 sums. x is not rounded to float8: it meets float8
    weights in float16, each row divided by its largest number first.

    **Raises:** ValueError for anything that does not fit, with the reason that `unsupported_reason` gives.

    Cost: the bytes of one layer of the weights, read once.
    """
    reason = unsupported_reason(x, weights, scales)
    if reason is not None:
        raise ValueError(f"stacked_matvec: {reason}")
    tile = tile or _tile(weights, scales)
    assert tile is not None
    (b, inside), dtype = x.shape, x.dtype
    outs = [weight.shape[1 if scales else 2] for weight in weights]
    columns = [out // tile.out for out in outs]
    size = None
    if scales:  # GPUs turn e4m3 into float16 in one instruction, into bfloat16 in many
        size = jnp.maximum(jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        x = (x.astype(jnp.float32) / size).astype(jnp.float16)
    if b > 1:
        x = jnp.pad(x, ((0, ROWS - b), (0, 0)))
    steps = inside // tile.inside
    splits = max(1, min(steps, BLOCKS // sum(columns)))
    parts = pl.pallas_call(
        partial(_kernel, tile=tile, columns=columns, steps=steps, splits=splits, rows=b, narrow=bool(scales)),
        grid=(sum(columns), splits),
        out_shape=jax.ShapeDtypeStruct((splits, ROWS, sum(outs)), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="stacked_matvec",
    )(layer[None], x, *weights)
    whole = jnp.split(jnp.sum(parts[:, :b], axis=0), [sum(outs[:n]) for n in range(1, len(outs))], axis=1)
    if size is not None:
        whole = [
            y * (size * jax.lax.dynamic_index_in_dim(scale, layer)) for y, scale in zip(whole, scales, strict=True)
        ]
    return [y.astype(dtype) for y in whole]


def unsupported_reason(
    x: Float[Array, "b i"],
    weights: Sequence[Float[Array, "layers ..."]],
    scales: Sequence[Float[Array, "layers _"]] = (),
) -> str | None:
    """Why `stacked_matvec` can't serve a call, in words; None if it can."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel computes in bfloat16 or float16; x is {x.dtype}"
    if x.ndim != 2 or x.shape[0] > ROWS:
        return f"the kernel takes x of at most {ROWS} rows, got shape {x.shape}"
    if len(scales) not in (0, len(weights)):
        return f"{len(weights)} weights have {len(scales)} scales"
    if scales and (reason := Device.default().reason_against_fp8()) is not None:
        return reason
    axis, want = (2, DTYPE) if scales else (1, x.dtype)
    for weight in weights:
        if weight.ndim != 3 or weight.shape[axis] != x.shape[1]:
            return f"x {x.shape} does not fit weight {weight.shape}"
        if weight.dtype != want:
            return f"weight is {weight.dtype}; for x of {x.dtype} {'with' if scales else 'without'} scales it is {want}"
    if _tile(weights, scales) is None:
        return f"the kernel needs axes that are multiples of 64, got {[weight.shape[1:] for weight in weights]}"
    if any(s.shape != w.shape[:2] for s, w in zip(scales, weights, strict=False)):
        return f"scales {[s.shape for s in scales]} are not one for each output of {[w.shape for w in weights]}"
    return None


def _tile(weights: Sequence[Array], scales: Sequence[Array]) -> Tile | None:
    """The fastest tile that divides all weights, if one does."""
    axis, tiles = (2, NARROW) if scales else (1, WIDE)

    def divides(tile: Tile) -> bool:
        return all(w.shape[axis] % tile.inside == 0 == w.shape[3 - axis] % tile.out for w in weights)

    return next(filter(divides, tiles), None)


def _kernel(
    layer_ref, x_ref, *refs, tile: Tile, columns: list[int], steps: int, splits: int, rows: int, narrow: bool
) -> None:
    *weight_refs, out_ref = refs
    block, split = pl.program_id(0), pl.program_id(1)
    layer = layer_ref[0]
    share = math.ceil(steps / splits)
    wanted = jnp.arange(ROWS, dtype=jnp.int32)[:, None] < rows

    def row_tile(first):
        if rows > 1:
            return x_ref[:, pl.ds(first, tile.inside)]
        return jnp.broadcast_to(x_ref[0, pl.ds(first, tile.inside)][None], (ROWS, tile.inside))

    before = 0
    for weight_ref, count in zip(weight_refs, columns, strict=True):

        @pl.when((block >= before) & (block < before + count))
        def _(weight_ref=weight_ref, before=before):
            column = (block - before) * tile.out

            def step(index, total):
                first = index * tile.inside
                if not narrow:
                    weight = weight_ref[layer, pl.ds(first, tile.inside), pl.ds(column, tile.out)]
                    return total + plgpu.dot(row_tile(first), weight)
                weight = weight_ref[layer, pl.ds(column, tile.out), pl.ds(first, tile.inside)]
                return total + plgpu.dot(row_tile(first), weight.astype(jnp.float16).T)

            total = jnp.zeros((ROWS, tile.out), jnp.float32)
            total = jax.lax.fori_loop(split * share, jnp.minimum((split + 1) * share, steps), step, total)
            plgpu.store(out_ref.at[split, :, pl.ds(block * tile.out, tile.out)], total, mask=wanted)

        before += count
