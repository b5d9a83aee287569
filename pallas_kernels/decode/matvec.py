"""A few rows times one layer of stacked weights, read where they lie, in 16 bits or in FP8.

Decoding multiplies one row a sequence with every weight: it is bound by reading them, and then by the number of its
kernels. A compiler's matrix products want an operand of their own, so a loop over layers first copies each layer's
slice, and moves three bytes for one. This kernel takes the stack and the layer's number, and all weights that share
their input (queries, keys and values; gate and up) in one launch. Each thread block has a few outputs and their whole
sums, so that what is done to a row before the product (adding to it, its norm) and after it (the activation of an MLP)
takes no kernels of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Device
from pallas_kernels.rows.quantize import ACTIVATIONS, Activation

ROWS = 16
"""Rows of a tensor-core product, and the most that a call may have."""


class Tile(NamedTuple):
    """How much of a weight a thread block loads at a time: summed and free indices; warps; loads in flight."""

    inside: int
    out: int
    warps: int
    stages: int


WIDE = Tile(128, 32, 4, 4), Tile(64, 32, 4, 4)
"""Of weights in 16 bits: the first one that divides all of a call's weights."""

NARROW = Tile(256, 32, 4, 4), Tile(64, 32, 4, 4)
"""The same of weights in FP8."""

DTYPE = jnp.dtype(jnp.float8_e4m3fn)
TINY = float(jnp.finfo(jnp.float32).tiny)


class Norm(NamedTuple):
    """RMSNorm of a row before the product: stacked weights, and `eps` and `offset` as `normed_rows` has them."""

    weight: Float[Array, "layers i"]
    eps: float
    offset: float | None = None


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

    - `x`: `[b, i]`, bfloat16 or float16, at most 16 rows.
    - `weights`: either all `[layers, i, o]` in x's dtype, or all float8_e4m3fn `[layers, o, i]`. i and each o are
      multiples of 64; o may differ from weight to weight.
    - `layer`: int32 scalar, may be traced.
    - `scales`: with float8 weights, float32 `[layers, o]` for each, what each output is to be multiplied with.
    - `activation` (static): "silu", or "gelu" in the form with a tanh: of two weights, return activation(first) ·
      second, computed in float32.
    - `dtype` (static): of the results; by default x's.
    - `tile` (static): how much a thread block loads at a time; by default the fastest that was measured.
    - `interpret` (static): run the kernel on a CPU, for tests.

    **Returns:** `[b, o]` for each weight, or one with an `activation`, with float32 sums. x is not rounded to float8:
    it meets float8 weights in float16, each row divided by its largest number first.

    **Raises:** ValueError for anything that does not fit, with the reason that `unsupported_reason` gives.

    Cost: the bytes of one layer of the weights, read once.
    """
    options: dict[str, Any] = {"activation": activation, "dtype": dtype, "tile": tile, "interpret": interpret}
    return _launch(x, None, weights, layer, scales, None, **options)[1]


def normed_matvec(
    x: Float[Array, "1 i"],
    added: Float[Array, "1 i"],
    norm: Norm,
    weights: Sequence[Float[Array, "layers ..."]],
    layer: Int[Array, ""],
    scales: Sequence[Float[Array, "layers _"]] = (),
    *,
    activation: Activation | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "1 i"], list[Float[Array, "1 o"]]]:
    """One row and what a block adds to it, and the norm of the sum times some weights, in one launch.

    **Arguments:** those of `stacked_matvec`, for one row, and

    - `added`: `[1, i]`, bfloat16, float16 or float32; it is rounded to x's dtype first.
    - `norm`: its weight `[layers, i]` in x's dtype.

    **Returns:** x + added in x's dtype, and what `stacked_matvec` returns of its norm. The sum of squares is float32.

    **Raises:** as `stacked_matvec`.
    """
    if x.shape[0] != 1 or added.shape != x.shape or norm.weight.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"normed_matvec: x {x.shape}, added {added.shape} and norm {norm.weight.shape} are not one row"
        )
    options: dict[str, Any] = {"activation": activation, "dtype": dtype, "tile": tile, "interpret": interpret}
    return _launch(x, added, weights, layer, scales, norm, **options)


def _launch(
    x: Array,
    added: Array | None,
    weights: Sequence[Array],
    layer: Array,
    scales: Sequence[Array],
    norm: Norm | None,
    *,
    activation: Activation | None,
    dtype: Any,
    tile: Tile | None,
    interpret: bool,
) -> tuple[Array, list[Array]]:
    reason = unsupported_reason(x, weights, scales)
    if reason is not None:
        raise ValueError(f"stacked_matvec: {reason}")
    tile, free = tile or _tile(weights, scales), 1 if scales else 2
    outs = [weight.shape[free] for weight in weights]
    if activation is not None:
        if len(outs) != 2 or outs[0] != outs[1]:
            raise ValueError(f"stacked_matvec: an activation takes two weights of one width, got {outs}")
        outs = outs[:1]
    assert tile is not None
    before, sums = [], []
    if norm is not None:
        before, sums = [added, norm.weight], [x]
    elif scales:
        size = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1)
        before = [jnp.maximum(size, TINY)]
    body = partial(
        _kernel,
        tile=tile,
        columns=[out // tile.out for out in outs],
        weights=len(weights),
        narrow=bool(scales),
        norm=None if norm is None else (norm.eps, norm.offset),
        activation=activation,
    )
    found = pl.pallas_call(
        body,
        grid=(sum(outs) // tile.out,),
        out_shape=[
            *(jax.ShapeDtypeStruct((x.shape[0], out), dtype or x.dtype) for out in outs),
            *(jax.ShapeDtypeStruct(y.shape, y.dtype) for y in sums),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="stacked_matvec",
    )(layer[None], x, *before, *weights, *scales)
    return (found[-1] if sums else x), list(found[: len(outs)])


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
    if any(size % 64 for weight in weights for size in weight.shape[1:]):
        return f"the kernel needs axes that are multiples of 64, got {[weight.shape[1:] for weight in weights]}"
    if any(s.shape != w.shape[:2] for s, w in zip(scales, weights, strict=False)):
        return f"scales {[s.shape for s in scales]} are not one for each output of {[w.shape for w in weights]}"
    return None


def _tile(weights: Sequence[Array], scales: Sequence[Array]) -> Tile:
    """The fastest tile that divides all weights."""
    axis, tiles = (2, NARROW) if scales else (1, WIDE)
    return next(tile for tile in tiles if all(weight.shape[axis] % tile.inside == 0 for weight in weights))


def _kernel(
    layer_ref,
    x_ref,
    *refs,
    tile: Tile,
    columns: list[int],
    weights: int,
    narrow: bool,
    norm: tuple[float, float | None] | None,
    activation: Activation | None,
) -> None:
    refs = list(refs)
    taken = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
    before_refs = taken(2 if norm is not None else int(narrow))
    weight_refs, scale_refs, out_refs = taken(weights), taken(weights if narrow else 0), taken(len(columns))
    block, layer = pl.program_id(0), layer_ref[0]
    (rows, inside), dtype = x_ref.shape, x_ref.dtype
    each = jnp.minimum(jnp.arange(ROWS, dtype=jnp.int32), rows - 1)  # rows past the last are it again
    size: Any = None

    if norm is None:

        def load(first):
            return x_ref[0, pl.ds(first, tile.inside)] if rows == 1 else x_ref[each, pl.ds(first, tile.inside)]

        if narrow:
            size = before_refs[0][each][:, None]
    else:
        added_ref, norm_ref = before_refs
        pieces = _pieces(inside)
        whole = [x_ref[0, piece] + added_ref[0, piece].astype(dtype) for piece in pieces]
        squares = sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in whole)
        factor = jax.lax.rsqrt(squares / inside + norm[0])

        @pl.when(block == 0)
        def _():
            for piece, y in zip(pieces, whole, strict=True):
                refs[0][0, piece] = y

        def normed(y, weight):
            y = y.astype(jnp.float32) * factor
            if norm[1] is not None:
                return (y * (norm[1] + weight.astype(jnp.float32))).astype(dtype)
            return weight * y.astype(dtype)

        def load(first):
            at = pl.ds(first, tile.inside)
            return normed(x_ref[0, at] + added_ref[0, at].astype(dtype), norm_ref[layer, at])

        if narrow:
            largest = [jnp.abs(normed(y, norm_ref[layer, p])) for y, p in zip(whole, pieces, strict=True)]
            size = jnp.maximum(_most([jnp.max(y.astype(jnp.float32)) for y in largest]), TINY)

    def operand(x):
        """Loaded numbers as the product takes them."""
        x = jnp.broadcast_to(x[None], (ROWS, tile.inside)) if rows == 1 else x
        # GPUs turn e4m3 into float16 in one instruction, into bfloat16 in many.
        return (x.astype(jnp.float32) / size).astype(jnp.float16) if narrow else x

    before = 0
    grouped = [weight_refs] if activation is not None else [[ref] for ref in weight_refs]
    scaled = ([scale_refs] if activation is not None else [[ref] for ref in scale_refs]) or [[]] * len(grouped)
    for group, factors, out_ref, count in zip(grouped, scaled, out_refs, columns, strict=True):

        @pl.when((block >= before) & (block < before + count))
        def _(group=group, factors=factors, out_ref=out_ref, before=before):
            out = pl.ds((block - before) * tile.out, tile.out)

            def product(ref, row, first):
                if not narrow:
                    return plgpu.dot(row, ref[layer, pl.ds(first, tile.inside), out])
                return plgpu.dot(row, ref[layer, out, pl.ds(first, tile.inside)].astype(jnp.float16).T)

            def step(index, state):
                x, totals = state
                following = load(jnp.minimum((index + 1) * tile.inside, inside - tile.inside))
                row = operand(x)
                return following, [
                    total + product(ref, row, index * tile.inside) for ref, total in zip(group, totals, strict=True)
                ]

            state = load(0), [jnp.zeros((ROWS, tile.out), jnp.float32)] * len(group)
            _, totals = jax.lax.fori_loop(0, inside // tile.inside, step, state)
            if narrow:
                totals = [y * size * ref[layer, out][None] for y, ref in zip(totals, factors, strict=True)]
            y = totals[0] if activation is None else ACTIVATIONS[activation](totals[0]) * totals[1]
            number = (block - before) * tile.out + jnp.arange(tile.out, dtype=jnp.int32)
            at = jnp.broadcast_to(each[:, None], y.shape), jnp.broadcast_to(number[None], y.shape)
            out_ref[at] = y.astype(out_ref.dtype)  # rows past the last write what it writes

        before += count


def _pieces(width: int) -> list[Any]:
    """All of a row, in slices of powers of two."""
    sizes = [1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]
    return [pl.ds(sum(sizes[:n]), size) for n, size in enumerate(sizes)]


def _most(values: list[Array]) -> Array:
    """The largest of some scalars."""
    largest = values[0]
    for y in values[1:]:
        largest = jnp.maximum(largest, y)
    return largest
