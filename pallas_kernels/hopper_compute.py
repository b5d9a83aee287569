"""The compute warpgroups: online softmax of 64 query rows each.

The scores of a step are computed beside the weighted values of the step before, and its softmax runs while the tensor
cores still work on those values: the two matrix products and the softmax of one warpgroup overlap, and so do the two
warpgroups. A query tile's first scores are computed beside the last values of the tile before it in the same way.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]

from pallas_kernels import hopper_tables as tables
from pallas_kernels.hopper_config import COMPUTE_WARPGROUPS, ROWS, STEP_KEYS
from pallas_kernels.hopper_launch import (
    Launch,
    Refs,
    item_of,
    share_of,
    split_head,
    swizzle_of,
    tile_transforms,
    views,
)
from pallas_kernels.hopper_product import start_product
from pallas_kernels.hopper_registers import SUM_COLUMNS, exp2, folded, raised, rescaled
from pallas_kernels.sizes import QUERY_TILE


def compute(
    launch: Launch,
    refs: Refs,
    warpgroup: jax.Array,
    *,
    q_smem,
    k_smem,
    v_smem,
    q_full,
    q_free,
    k_full,
    v_full,
    k_free,
    v_free,
    bias_smem,
    bias_full,
    lse_smem=None,
):
    """A compute warpgroup: online softmax of its 64 rows over the steps of every query tile."""
    stages, parts, width = launch.config.stages, launch.parts, launch.part_width
    k_smem, v_smem = views(k_smem, launch)[1], views(v_smem, launch)[1]
    log2_scale = launch.scale * math.log2(math.e)
    layout = plgpu.Layout.WGMMA
    shape = (ROWS, STEP_KEYS)

    polynomials = launch.config.polynomials(launch.head_dim)

    def rows_to(values, shape):
        return lax.broadcast_in_dim(values, shape, [0])

    def start_scores(s_ref, queries, slot):
        """Queues the products of queries and keys, part by part of head_dim."""
        for part in range(parts):
            columns = pl.ds(part * width, width)
            plgpu.wgmma(s_ref, queries.at[:, columns], k_smem.at[slot, part].transpose((1, 0)))

    def whole_rows(smem, slot):
        return jnp.concatenate([smem[slot, part] for part in range(parts)], 1)

    def emulated_scores(queries, slot):
        return jnp.dot(queries[...], whole_rows(k_smem, slot).T, preferred_element_type=jnp.float32)

    def emulated_values(acc, p16, slot):
        return acc + jnp.dot(p16, whole_rows(v_smem, slot), preferred_element_type=jnp.float32)

    def weigh(acc, p16, slot):
        """Queues the product of probabilities and values; the sum is there after the next wait."""
        return start_product(acc, p16, v_smem.at[slot], tile_transforms(launch), swizzle_of(launch))

    share = share_of(launch)

    def steps_of(index):
        z, tile = item_of(launch, jnp.clip(index, 0, share - 1))
        return jnp.where((index >= 0) & (index < share), refs.work[z, tile, tables.STEPS], 0)

    def queries_of(index):
        return q_smem.at[lax.rem(index, jnp.int32(2)) * COMPUTE_WARPGROUPS + warpgroup]

    def zeros():
        return plgpu.layout_cast(jnp.zeros((ROWS, launch.head_dim), jnp.float32), layout)

    def softmax(s, m):
        """Probabilities of one step relative to the maxima m, and their sums."""
        p = exp2(s * log2_scale - rows_to(m, shape), polynomials, emulate=launch.emulate)
        return p, m, folded(p, emulate=launch.emulate)

    def no_total():
        return plgpu.layout_cast(jnp.zeros((ROWS, SUM_COLUMNS), jnp.float32), layout)

    def multiply(queries, slot, before, finish, more, first=lambda: None, bias_of=lambda: None):
        """Scores of one step beside the weighted values of the step before, and then the step's softmax.

        **Arguments:** `before`: (weighted values, probabilities, slot) of the step before, or None; `finish(s, bias)`
        makes the results from the scores; `more`: whether a step follows whose keys to wait for; `first` runs before
        that wait.

        **Returns:** the weighted values with those of the step before, and what `finish` returned.
        """
        acc: Any
        acc, p16, slot_before = before or (None, None, None)
        if before:
            plgpu.barrier_wait(v_full.at[slot_before])

        def finish_scores(s, bias):
            plgpu.barrier_arrive(k_free.at[slot])
            return finish(s, bias)

        def wait_next_keys():
            first()

            # Where the softmax ends: the branch keeps the compiler from waiting for the products any sooner.
            @pl.when(more)
            def _():
                plgpu.barrier_wait(k_full.at[lax.rem(slot + 1, jnp.int32(stages))])

        if launch.emulate:
            s = emulated_scores(queries, slot)
            if before:
                acc = emulated_values(acc, p16, slot_before)
            plgpu.commit_smem()
            after = finish_scores(s, bias_of())
            wait_next_keys()
        else:

            def products(s_ref):
                start_scores(s_ref, queries, slot)
                weighted = weigh(acc, p16, slot_before) if before else None
                bias = bias_of()
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1 if before else 0)
                after = lax.optimization_barrier(finish_scores(s, bias))
                wait_next_keys()
                if before:
                    plgpu.wgmma_wait(0)
                return weighted, after

            acc, after = pl.run_scoped(products, ACC(shape, jnp.float32))
        p, *rest = after
        if before:
            # The rounded probabilities must not be written while the tensor cores read the last ones.
            acc, p = lax.optimization_barrier((acc, p))
            plgpu.barrier_arrive(v_free.at[slot_before])
        return acc, p, *rest

    def diagonal(s, _):
        """Softmax under the causal mask. Each row sees its own key, so the maximum is finite from here on."""
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + warpgroup * ROWS
        s = jnp.where(row >= plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout), s, -jnp.inf)
        return softmax(s, s.max(axis=1) * log2_scale)

    def query_tile(index, carry):
        """All steps of a query tile but its first, then its last values beside the first scores of the next tile.

        The carry holds the first step's running maximum and sum and its probabilities. Tile -1, which has no step,
        begins the pipeline.
        """
        step0, m, total, p16 = carry
        z, tile = item_of(launch, jnp.maximum(index, 0))
        steps, next_steps = steps_of(index), steps_of(index + 1)
        no_bias = jnp.where(steps > 0, refs.work[z, tile, tables.STEPS_NO_BIAS], 0)
        rows_valid = refs.work[z, tile, tables.ROWS_VALID]
        buffer = lax.rem(jnp.maximum(index, 0), jnp.int32(2))
        queries = queries_of(jnp.maximum(index, 0))

        def slot_of(step):
            return lax.rem(step0 + step, jnp.int32(stages))

        def bias_of(step):
            slot = slot_of(step)
            plgpu.barrier_wait(bias_full.at[slot])
            bias = plgpu.load(bias_smem.at[slot], layout=layout.reduce(0), optimized=False)
            plgpu.commit_smem()  # before the next copy into it, which follows the keys' being free
            return bias

        def release_queries(when):
            """The previous query tile's output has left its buffer, which the memory warpgroup may fill again."""

            @pl.when((index > 0) & when)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free.at[1 - buffer])

        def next_step(biased: bool):
            def body(step, carry):
                acc, m, total, p16 = carry

                def finish(s, bias):
                    if bias is not None:
                        s = s + lax.broadcast_in_dim(bias.astype(jnp.float32), shape, [1])
                    return softmax(s, raised(m, s, log2_scale, emulate=launch.emulate))

                acc, p, m_new, added = multiply(
                    queries,
                    slot_of(step),
                    (acc, p16, slot_of(step - 1)),
                    finish,
                    more=(step + 1 < steps) | (next_steps > 0),
                    first=lambda: release_queries(step == 1),
                    bias_of=(lambda: bias_of(step)) if biased else lambda: None,
                )
                acc, total = rescaled(acc, total, m, m_new, emulate=launch.emulate)
                return acc, m_new, total + added, p.astype(launch.dtype)

            return body

        carry = zeros(), m, total, p16
        carry = lax.fori_loop(jnp.int32(1), no_bias, next_step(biased=False), carry)
        acc, m, total, p16 = lax.fori_loop(no_bias, steps, next_step(biased=True), carry)
        release_queries(steps < 2)

        def first_of_next(before):
            acc, p, m, total = multiply(queries_of(index + 1), slot_of(steps), before, diagonal, more=next_steps > 1)
            return acc, m, total, p.astype(launch.dtype)

        def last_and_first():
            return first_of_next((acc, p16, slot_of(steps - 1)))

        def last_step():
            slot = slot_of(steps - 1)
            plgpu.barrier_wait(v_full.at[slot])
            if launch.emulate:
                product = emulated_values(acc, p16, slot)
                plgpu.commit_smem()
            else:
                product = weigh(acc, p16, slot)
                plgpu.wgmma_wait(0)
                product = lax.optimization_barrier(product)
            plgpu.barrier_arrive(v_free.at[slot])
            return product

        def first_step():
            plgpu.barrier_wait(k_full.at[slot_of(steps)])
            return first_of_next(None)[1:]

        def apart():
            return lax.cond(steps > 0, last_step, lambda: acc), *lax.cond(next_steps > 0, first_step, nothing)

        @pl.when(index + 1 < share)
        def _():
            plgpu.barrier_wait(q_full.at[lax.rem(index + 1, jnp.int32(2))])

        @pl.when((steps == 1) & (next_steps > 0))
        def _():
            # A lone step does not wait for the keys of the next tile: they come after queries whose buffer the output
            # of the tile before has to leave first.
            plgpu.barrier_wait(k_full.at[slot_of(steps)])

        acc, *carry = lax.cond((steps > 0) & (next_steps > 0), last_and_first, apart)

        @pl.when(index >= 0)
        def _(total=total):
            total = total.sum(axis=1)
            limit = rows_valid - warpgroup * ROWS
            row = plgpu.broadcasted_iota(jnp.int32, acc.shape, 0, layout=layout)
            queries[...] = jnp.where(row < limit, acc * rows_to(1 / total, acc.shape), 0.0).astype(launch.dtype)
            if lse_smem is not None:
                row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout.reduce(1))
                lse_smem[warpgroup] = jnp.where(row < limit, m * math.log(2) + jnp.log(total), -jnp.inf)
            plgpu.commit_smem()
            batch, head, _ = split_head(launch, z)
            rows = pl.ds(tile * QUERY_TILE + warpgroup * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(queries, refs.out.at[batch, rows, head])
            if lse_smem is not None:
                plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], refs.lse.at[z, rows])

        return step0 + steps, *carry

    def nothing():
        row = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))
        return row, no_total(), plgpu.layout_cast(jnp.zeros(shape, launch.dtype), layout)

    lax.fori_loop(jnp.int32(-1), share, query_tile, (jnp.int32(0), *nothing()))

    @pl.when(share > 0)
    def _():
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(q_free.at[lax.rem(share - 1, jnp.int32(2))])
