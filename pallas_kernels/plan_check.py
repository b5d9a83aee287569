"""Whether a plan keeps the promise of `SparsePlan.clean`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.bands import at_place, entries_before, kept_bands, listed_bands
from pallas_kernels.plan import SparsePlan
from pallas_kernels.rule import listed
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE


@jax.jit
def lists_are_clean(plan: SparsePlan, *, q_offset: int | Int[Array, ""] = 0) -> Bool[Array, "b n"]:
    """Whether a plan's lists are what `SparsePlan.clean` promises, whether or not the plan promises it.

    Nothing checks the promise when a kernel runs, for that would cost what it saves. This does, for those who build
    plans of their own: in a test, or in a program beside the attention. A few passes over the lists.

    **Arguments:** `q_offset`: position of the first query row, a multiple of 128.

    **Returns:** bool `[b, n]`, or `[1, 1]` for the plan that visits the diagonal only.
    """
    b, n = plan.shape() or (1, 1)
    clean = jnp.ones((b, n), bool)
    bands = None
    if plan.columns is not None and plan.column_count is not None:
        clean &= _ascending(plan.columns, plan.column_count)
    if plan.bands is not None and plan.band_count is not None:
        kept = kept_bands(plan.bands, plan.band_count, plan.block_count, multiple=plan.band_multiple)
        clean &= (kept | ~listed(plan.bands, plan.band_count)).all(-1)
        flat = plan.bands.reshape(b * n, -1), plan.band_count.reshape(-1)
        bands = listed_bands(*flat, None, multiple=plan.band_multiple, clean=True)
    if plan.blocks is not None and plan.block_count is not None:
        clean &= _ascending(plan.blocks, plan.block_count).all(-1)
        if bands is not None and bands.size:
            first = q_offset + QUERY_TILE * jnp.arange(plan.blocks.shape[2], dtype=jnp.int32)
            distance = (first[:, None] - KEY_TILE * plan.blocks).reshape(b * n, -1)
            in_band = at_place(bands, entries_before(bands, distance)) == distance
            clean &= ~(in_band.reshape(plan.blocks.shape) & listed(plan.blocks, plan.block_count)).any((-2, -1))
    return clean


def _ascending(values: Int[Array, "*lead w"], count: Int[Array, "*lead"]) -> Bool[Array, "*lead"]:
    """Whether entries below the count are at least 0 and each is greater than the one before."""
    before = jnp.pad(values[..., :-1], [(0, 0)] * (values.ndim - 1) + [(1, 0)], constant_values=-1)
    return ((values > before) | ~listed(values, count)).all(-1)
