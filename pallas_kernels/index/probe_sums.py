"""Sums over the softmax weights of probe rows, from their scores: one read of the scores each, nothing stored between.

An index takes three: each row's own (the maximum and the total of its softmax), and the weights of a head's probes
together, by key and by distance. A compiler's kernels read the scores twice for the first. For the last they gather
each score by an index of its own; here a thread block has consecutive distances of one head, so that what it reads of a
row lies side by side too, only shifted by the row's position.

Cost: the bytes of the scores, and a dozen instructions for each, with one exponential.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """Elements of a row that each thread of a thread block has, its warps, and rows that it loads ahead of their sum.

    All are powers of two.
    """

    each: int
    warps: int
    rows: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def size(self) -> int:
        return self.each * self.threads


TOTALS, SUMS = Tile(32, 8), Tile(4, 4, 8)
"""For `row_totals`, where a thread block has a piece of one row; for sums over all rows of a head."""


def row_totals(
    scores: Float[Array, "rows s"],
    positions: Int[Array, " rows"],
    factor: float,
    *,
    tile: Tile = TOTALS,
    interpret: bool = False,
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """Maximum and total of each row's causal softmax: top = max(scores · factor), total = Σ exp(scores · factor − top).

    **Arguments:**

    - `scores`: `[rows, s]`, bfloat16, float16 or float32.
    - `positions`: int32 `[rows]`. A row sees the keys up to its position; none if that is negative.
    - `factor` (static): above zero.
    - `tile` (static): how a thread block takes a row. `interpret` (static): run the kernel on a CPU, for tests.

    **Returns:** float32 `[rows]` both. A row that sees nothing has 0 and 0; a maximum that is not finite counts as 0.

    **Raises:** ValueError for what does not fit, with the reason that `unsupported_reason` gives.
    """
    _check("row_totals", scores, factor)
    rows, s = scores.shape
    pieces, step = pl.cdiv(s, tile.size), math.gcd(s, 8)

    def kernel(scores_ref, position_ref, top_ref, total_ref):
        row, piece = pl.program_id(0), pl.program_id(1)
        position, first = position_ref[row], piece * tile.size
        key = first + jnp.arange(tile.size, dtype=jnp.int32)
        # Loads are narrow where each element has a mask of its own: here a piece has one, or 16 bytes have.
        inside = jnp.broadcast_to(first <= position, key.shape)
        if s % tile.size:
            inside &= jax.lax.div(key, step) < s // step
        found = plgpu.load(scores_ref.at[row, key], mask=inside, other=-jnp.inf).astype(jnp.float32)
        found = jnp.where(key <= position, found, -jnp.inf)
        top = jnp.max(found) * (factor * LOG2_E)
        top_ref[row, piece] = top
        total_ref[row, piece] = jnp.sum(_weights(found, factor, _finite(top), interpret))

    shape = jax.ShapeDtypeStruct((rows, pieces), jnp.float32)
    tops, totals = pl.pallas_call(
        kernel,
        grid=(rows, pieces),
        out_shape=[shape, shape],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="row_totals",
    )(scores, positions)
    top = _finite(jnp.max(tops, axis=1))
    # Of a piece that is not seen, −inf and 0.
    return top / LOG2_E, jnp.sum(totals * jnp.exp2(tops - top[:, None]), axis=1)


def weight_sums(
    scores: Float[Array, "heads p s"],
    positions: Int[Array, "heads p"],
    shift: Float[Array, "heads p"],
    factor: float,
    *,
    skip: int | None = None,
    tile: Tile = SUMS,
    interpret: bool = False,
) -> Float[Array, "heads s"]:
    """Weights exp(scores · factor − shift) of the keys that each row sees, summed over the rows of a head: by key, or
    by the distance of the key before the row.

    **Arguments:** those of `row_totals`, with an axis of heads, and

    - `shift`: float32 `[heads, p]`; inf for a row without weights.
    - `skip` (static): by distance, without the keys before this one. None: by key.

    **Returns:** float32 `[heads, s]`.

    **Raises:** as `row_totals`.
    """
    _check("weight_sums", scores, factor)
    heads, p, s = scores.shape
    ahead = math.gcd(p, tile.rows)

    def kernel(scores_ref, position_ref, shift_ref, sums_ref):
        head, first = pl.program_id(0), pl.program_id(1) * tile.size + jnp.arange(tile.threads, dtype=jnp.int32)
        # Arrays of one element a thread: neighbours have neighbouring elements, in either direction.
        places = [first + i * tile.threads for i in range(tile.each)]

        def some_rows(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            loaded = []
            for row in [head * p + step * ahead + i for i in range(ahead)]:
                position = jnp.minimum(position_ref[row], s - 1)
                keys = [place if skip is None else position - place for place in places]
                seen = [place <= (position if skip is None else position - skip) for place in places]
                # −inf becomes a weight of 0 without a further look at the mask, of which there are more than a
                # thread has room for until the loads arrive.
                found = [
                    plgpu.load(scores_ref.at[row, key], mask=mask, other=-jnp.inf)
                    for key, mask in zip(keys, seen, strict=True)
                ]
                loaded.append((found, shift_ref[row] * LOG2_E))
            for found, of_row in loaded:
                weights = [_weights(x.astype(jnp.float32), factor, of_row, interpret) for x in found]
                sums = tuple(total + x for total, x in zip(sums, weights, strict=True))
            return sums

        sums = jax.lax.fori_loop(0, p // ahead, some_rows, (jnp.zeros(first.shape, jnp.float32),) * tile.each)
        for place, total in zip(places, sums, strict=True):
            plgpu.store(sums_ref.at[head, place], total, mask=place < s)

    return pl.pallas_call(
        kernel,
        grid=(heads, pl.cdiv(s, tile.size)),
        out_shape=jax.ShapeDtypeStruct((heads, s), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="weights_by_key" if skip is None else "weights_by_distance",
    )(scores.reshape(-1, s), positions.reshape(-1), shift.reshape(-1))


def unsupported_reason(scores: Float[Array, "*rows s"], factor: float) -> str | None:
    """Why the kernels can't serve such scores, in words; None if they can."""
    # Of any size: Pallas has offsets of 32 bits, in elements, up to arrays of 2**32 bytes (see `decode.addresses`).
    if scores.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"the kernel reads bfloat16, float16 and float32; the scores are {scores.dtype}"
    if scores.size == 0:
        return f"there is nothing in scores of shape {scores.shape}"
    if not 0 < factor < math.inf:
        return f"the kernel needs a factor above zero; it is {factor}"
    return None


def _check(name: str, scores: Array, factor: float) -> None:
    reason = unsupported_reason(scores, factor)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")


def _finite(top: Any) -> Any:
    return jnp.where(jnp.abs(top) < jnp.inf, top, 0)


def _weights(scores: Array, factor: float, shift: Array, interpret: bool) -> Array:
    """2^(scores · factor · log2(e) − shift), in two instructions. The compiler's own form has four more, which keep
    numbers below 2⁻¹²⁶."""
    shift = jnp.broadcast_to(shift, scores.shape)
    if interpret:
        return jnp.exp2(scores * (factor * LOG2_E) - shift)
    (weights,) = plgpu.elementwise_inline_asm(
        "{ .reg .f32 x; fma.rn.f32 x, $1, $2, $3; ex2.approx.ftz.f32 $0, x; }",
        args=[scores, jnp.full(scores.shape, factor * LOG2_E, jnp.float32), -shift],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, jnp.float32)],
    )
    return weights
