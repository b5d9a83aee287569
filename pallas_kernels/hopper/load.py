"""The one warp that loads: walks the lists of a plan and issues every TMA load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tables
from pallas_kernels.hopper.config import COMPUTE_WARPGROUPS, ROWS, STEP_KEYS
from pallas_kernels.hopper.launch import Launch, Refs, item_of, share_of, split_head, views
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE


def load(
    launch: Launch,
    refs: Refs,
    *,
    q_smem,
    k_smem,
    v_smem,
    bias_smem,
    q_full,
    q_free,
    k_full,
    v_full,
    bias_full,
    k_free,
    v_free,
    **_,
):
    """Loads the queries of each of this thread block's tiles, then keys and values step by step."""
    stages = launch.config.stages
    k_smem, v_smem = views(k_smem, launch)[0], views(v_smem, launch)[0]

    def copy_rows(source: Any, target: Any, barrier: Any) -> None:
        """Copies rows of head_dim elements, one part of their width at a time."""
        for part in range(launch.parts):
            columns = pl.ds(part * launch.part_width, launch.part_width)
            plgpu.copy_gmem_to_smem(source(columns), target.at[part], barrier)

    def fill(slot: jax.Array, step: jax.Array, copy: Callable[[Any, Any, Any, Any], None]) -> None:
        """Loads one step: waits for each buffer, then has `copy` fill its halves."""
        for source, gathered, smem, free, full in (
            (refs.k, refs.keys, k_smem, k_free, k_full),
            (refs.v, refs.values, v_smem, v_free, v_full),
        ):

            @pl.when(step >= stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[slot])

            copy(source, gathered, smem.at[slot], full.at[slot])

    def half(smem, index: int):
        return smem.at[:, pl.ds(index * KEY_TILE, KEY_TILE)]

    def query_tile(turn, step0):
        z, tile = item_of(launch, turn)
        batch, head, kv_head = split_head(launch, z)
        no_bias = refs.work[z, tile, tables.STEPS_NO_BIAS]
        steps = refs.work[z, tile, tables.STEPS]
        bands = refs.work[z, tile, tables.BANDS]
        whole = refs.work[z, tile, tables.TILES]
        diagonal = refs.work[z, tile, tables.DIAGONAL]

        buffer = lax.rem(turn, jnp.int32(2))

        @pl.when(turn >= 2)
        def _():
            plgpu.barrier_wait(q_free.at[buffer])

        for w in range(COMPUTE_WARPGROUPS):
            rows = pl.ds(tile * QUERY_TILE + w * ROWS, ROWS)
            target = q_smem.at[buffer * COMPUTE_WARPGROUPS + w]
            plgpu.copy_gmem_to_smem(refs.q.at[batch, rows, head], target, q_full.at[buffer])

        def whole_tile(source, smem, full, start):
            # The product proves to the compiler what `aligned` promises.
            rows = pl.ds(lax.div(start, jnp.int32(KEY_TILE)) * KEY_TILE if launch.aligned else start, KEY_TILE)
            copy_rows(lambda columns: source.at[batch, rows, kv_head, columns], smem, full)

        def whole_tile_at(place):
            """First key of the tile at `place` in the bands and then the blocks.

            A band that begins before key 0 is read from key 0 on; the bias hides the keys past its end.
            """
            distance = refs.bands[z, jnp.minimum(place, refs.bands.shape[1] - 1)]
            band = jnp.maximum(diagonal - distance, 0)
            if refs.blocks is None:
                return band
            block = jnp.clip(place - bands, 0, refs.blocks.shape[2] - 1)
            in_blocks = (place >= bands) & (place < whole)
            return lax.cond(in_blocks, lambda: refs.blocks[z, tile, block] * KEY_TILE, lambda: band)

        def pair(step):
            return whole_tile_at(2 * step - 2), whole_tile_at(2 * step - 1)

        def whole_step(step, carry):
            first, second = carry
            ahead = pair(step + 1)  # read the list one step ahead of its use
            total = step0 + step

            def copy(source, _, smem, full):
                whole_tile(source, half(smem, 0), full, first)
                whole_tile(source, half(smem, 1), full, second)

            fill(lax.rem(total, jnp.int32(stages)), total, copy)
            return ahead

        def bias_step(step, carry):
            first, second = carry
            total = step0 + step
            place = 2 * step - 2 - whole  # of the first half among the columns; -2 and -1 are the last whole tiles

            def copy(source, gathered, smem, full):
                for index, start in ((0, first), (1, second)):
                    into = half(smem, index)
                    if gathered is None:
                        # A missing second half may hold any keys: the bias hides them.
                        whole_tile(source, into, full, start)
                        continue

                    @pl.when(place + index < 0)
                    def _(into=into, start=start):
                        whole_tile(source, into, full, start)

                    @pl.when(place + index >= 0)
                    def _(into=into, index=index):
                        rows = pl.ds((place + index) * KEY_TILE, KEY_TILE)
                        copy_rows(lambda columns: gathered.at[z, rows, columns], into, full)

            slot = lax.rem(total, jnp.int32(stages))
            fill(slot, total, copy)
            # The keys' buffer was free, so the bias beside it has been read too.
            row = (z if refs.bias.shape[0] > 1 else 0, tile if refs.bias.shape[1] > 1 else 0)
            part = pl.ds((place + 2) * KEY_TILE, STEP_KEYS)
            plgpu.copy_gmem_to_smem(refs.bias.at[(*row, part)], bias_smem.at[slot], bias_full.at[slot])
            return carry

        @pl.when(steps > 0)
        def _():
            # The diagonal is the pair of tiles "first" and "second" of step 0.
            carry = whole_step(jnp.int32(0), (diagonal, diagonal + KEY_TILE))
            carry = lax.fori_loop(jnp.int32(1), no_bias, whole_step, carry)
            lax.fori_loop(no_bias, steps, bias_step, carry)

        return step0 + steps

    share = share_of(launch)
    total = lax.fori_loop(jnp.int32(0), share, query_tile, jnp.int32(0))

    # Leave no arrival behind: every buffer that was filled has been read when the block ends.
    def drain(step, _):
        plgpu.barrier_wait(k_free.at[lax.rem(step, jnp.int32(stages))])
        plgpu.barrier_wait(v_free.at[lax.rem(step, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)

    def drain_queries(turn, _):
        plgpu.barrier_wait(q_free.at[lax.rem(turn, jnp.int32(2))])

    lax.fori_loop(jnp.maximum(share - 2, 0), share, drain_queries, None)
