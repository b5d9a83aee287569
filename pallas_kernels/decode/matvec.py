"""A few rows times one layer of stacked weights, read where they lie, in 16 bits or in FP8.

Decoding multiplies one row a sequence with every weight: it is bound by reading them, and then by the number of its
kernels. A compiler's matrix products want an operand of their own, so a loop over layers first copies each layer's
slice, and moves three bytes for one. This kernel takes the stack and the layer's number, and all weights that share
their input (queries, keys and values; gate and up) in one launch. Each thread block has a few outputs and their whole
sums, so that nothing is left to add up, and the activation of an MLP takes no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.decode.addresses import addressable, wraps
from pallas_kernels.device import Device
from pallas_kernels.rows.quantize import Activation, activated

ROWS = 16
"""Rows of a tensor-core product, and the most that a call may have."""


class Tile(NamedTuple):
    """How much of a weight a thread block loads at a time: summed and free indices; warps; loads in flight."""

    inside: int
    out: int
    warps: int
    stages: int


WIDE = Tile(128, 32, 4, 6), Tile(64, 32, 4, 6)
"""Of weights in 16 bits: the first one that divides all of a call's weights.

On an H200, of [4096, 4096] 11.1 µs, with 64 outputs 12.4, with 256 summed 11.6 (commit 8d1d2ad).
"""

WIDE_PAIR = Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)
"""Of two such weights, of which a thread block multiplies with both: [4096, 14336] 56.9 µs, with 32 outputs 75.5."""

NARROW = Tile(256, 32, 4, 4), Tile(64, 32, 4, 4)
"""Of weights in FP8. On an H200, of [4096, 4096] 9.3 µs, with 128 summed 9.9, with 64 outputs 14.5 (on commit 358d937).
"""

NARROW_PAIR = Tile(256, 32, 4, 3), Tile(64, 32, 4, 3)
"""Of two such weights: [14336, 4096] 32.5 µs, with 128 summed of 64 outputs 34.8."""

DTYPE = jnp.dtype(jnp.float8_e4m3fn)


def stacked_matvec(
    x: Float[Array, "b i"],
    weights: Sequence[Float[Array, "layers ..."]],
    layer: Int[Array, ""],
    scales: Sequence[Float[Array, "layers _"]] = (),
    *,
    activation: Activation | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> list[Float[Array, "b o"]]:
    """A few rows times one layer of each of several stacked weights: `x @ weight[layer]`, for all weights in one
    launch.

    **Arguments:**

    - `x`: `[b, i]`, bfloat16 or float16, 1 to 16 rows.
    - `weights`: either all `[layers, i, o]` in x's dtype, or all float8_e4m3fn `[layers, o, i]`. i and each o are
      multiples of 64; o may differ from weight to weight.
    - `layer`: int32 scalar, may be traced.
    - `scales`: with float8 weights, float32 `[layers, o]` for each, what each output is to be multiplied with.
    - `activation` (static): "silu", or "gelu" in the form with a tanh: of two weights, return activation(first) ·
      second, computed in float32.
    - `dtype` (static): of the results; by default x's.
    - `tile` (static): how much a thread block loads at a time; by default the fastest that was measured.
    - `interpret` (static): run the kernel on a CPU, for tests.

    **Returns:** `[b, o]` for each weight, or one with an `activation`, with float32 sums. x is not rounded:
    float8 weights become numbers of its dtype, exactly.

    **Raises:** ValueError for anything that does not fit, with the reason that `unsupported_reason` gives.

    Cost: the bytes of one layer of the weights, read once; of float8 stacks of 2 to 4 GiB the layer is copied first.
    """
    reason = unsupported_reason(x, weights, scales)
    if reason is not None:
        raise ValueError(f"stacked_matvec: {reason}")
    tile, free = tile or _tile(weights, scales, activation), 1 if scales else 2
    outs = [weight.shape[free] for weight in weights]
    if activation is not None:
        if len(outs) != 2 or outs[0] != outs[1]:
            raise ValueError(f"stacked_matvec: an activation takes two weights of one width, got {outs}")
        outs = outs[:1]
    body = partial(
        _kernel, tile=tile, columns=[out // tile.out for out in outs], narrow=bool(scales), activation=activation
    )
    layer, stacks = addressable(layer, *weights, *scales)
    found = pl.pallas_call(
        body,
        grid=(sum(outs) // tile.out,),
        out_shape=[jax.ShapeDtypeStruct((x.shape[0], out), dtype or x.dtype) for out in outs],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="stacked_matvec",
    )(layer[None], x, *stacks)
    return list(found)


def unsupported_reason(
    x: Float[Array, "b i"],
    weights: Sequence[Float[Array, "layers ..."]],
    scales: Sequence[Float[Array, "layers _"]] = (),
) -> str | None:
    """Why `stacked_matvec` can't serve a call, in words; None if it can."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel computes in bfloat16 or float16; x is {x.dtype}"
    if x.ndim != 2 or not 0 < x.shape[0] <= ROWS:
        return f"the kernel takes x of 1 to {ROWS} rows, got shape {x.shape}"
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
    if any(size % 64 for weight in weights for size in weight.shape[1:]):
        return f"the kernel needs axes that are multiples of 64, got {[weight.shape[1:] for weight in weights]}"
    if any(wraps(weight.dtype, weight.size // weight.shape[0]) for weight in weights):
        return f"a layer of 2**31 to 2**32 one-byte numbers is addressed with 32 bits, got {weights[0].shape}"
    if any(s.shape != w.shape[:2] for s, w in zip(scales, weights, strict=False)):
        return f"scales {[s.shape for s in scales]} are not one for each output of {[w.shape for w in weights]}"
    return None


def _tile(weights: Sequence[Array], scales: Sequence[Array], activation: Activation | None) -> Tile:
    """The fastest tile that divides all weights."""
    alone = activation is None
    axis, tiles = (2, NARROW if alone else NARROW_PAIR) if scales else (1, WIDE if alone else WIDE_PAIR)
    return next(tile for tile in tiles if all(weight.shape[axis] % tile.inside == 0 for weight in weights))


def _kernel(
    layer_ref, x_ref, *refs, tile: Tile, columns: list[int], narrow: bool, activation: Activation | None
) -> None:
    groups = [1] * len(columns) if activation is None else [2]
    inputs, out_refs = list(refs[: -len(columns)]), refs[-len(columns) :]
    weight_refs, scale_refs = inputs[: sum(groups)], inputs[sum(groups) :]
    block, layer = pl.program_id(0), layer_ref[0]
    rows, inside = x_ref.shape
    each = jnp.arange(ROWS, dtype=jnp.int32)

    def columns_of(ref, first, count):
        """Some columns of every row, and which rows there are. In two dimensions the compiler loads them ahead."""
        column = first + jnp.arange(count, dtype=jnp.int32)
        at = (jnp.broadcast_to(x, (ROWS, count)) for x in (each[:, None], column[None]))
        return ref.at[tuple(at)], jnp.broadcast_to(each[:, None] < rows, (ROWS, count))

    before = 0
    for place, (group, out_ref, count) in enumerate(zip(groups, out_refs, columns, strict=True)):

        @pl.when((block >= before) & (block < before + count))
        def _(place=place, group=group, out_ref=out_ref, before=before):
            column = (block - before) * tile.out
            out = pl.ds(column, tile.out)

            def product(ref, x, first):
                if not narrow:
                    return plgpu.dot(x, ref[layer, pl.ds(first, tile.inside), out])
                weight = ref[layer, out, pl.ds(first, tile.inside)]
                # GPUs turn e4m3 into float16 in one instruction, and straight into bfloat16 in many.
                return plgpu.dot(x, weight.astype(jnp.float16).astype(jnp.float32).astype(x.dtype).T)

            def step(index, totals):
                first = index * tile.inside
                source, there = columns_of(x_ref, first, tile.inside)
                x = plgpu.load(source, mask=there, other=0)
                return [y + product(ref, x, first) for y, ref in zip(totals, weight_refs[place:][:group], strict=True)]

            totals = [jnp.zeros((ROWS, tile.out), jnp.float32)] * group
            totals = jax.lax.fori_loop(0, inside // tile.inside, step, totals)
            if narrow:
                factors = [ref[layer, out][None] for ref in scale_refs[place:][:group]]
                totals = [y * factor for y, factor in zip(totals, factors, strict=True)]
            y = totals[0] if activation is None else activated(totals[0], activation) * totals[1]
            target, there = columns_of(out_ref, column, tile.out)
            plgpu.store(target, y.astype(out_ref.dtype), mask=there)

        before += count
