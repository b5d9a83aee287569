"""The compute warpgroups: online softmax of 64 query rows each.

The scores of a step are computed beside the weighted values of the step before, and its softmax runs while the tensor
cores still work on those values: the two matrix products and the softmax of one warpgroup overlap, and so do the two
warpgroups. A query tile's first scores are computed beside the last values of the tile before it in the same way.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]

from pallas_kernels import tables
from pallas_kernels.hopper.registers import rescaled
from pallas_kernels.hopper.warpgroup import SCORES, Warpgroup


def compute(group: Warpgroup) -> None:
    """A compute warpgroup: online softmax of its 64 rows over the steps of every query tile."""
    launch, share = group.launch, group.share()

    def steps_of(item):
        steps = group.work(jnp.clip(item, 0, share - 1), tables.STEPS)
        return jnp.where((item >= 0) & (item < share), steps, 0)

    no_step: Any = (None, None, None)

    def multiply(queries, slot, before, finish, more, first=lambda: None, bias_of=lambda: None):
        """Scores of one step beside the weighted values of the step before, and then the step's softmax.

        **Arguments:** `before`: (weighted values, probabilities, slot) of the step before, or None; `finish(s, bias)`
        makes the results from the scores; `more`: whether a step follows whose keys to wait for; `first` runs before
        that wait.

        **Returns:** the weighted values with those of the step before, and what `finish` returned.
        """
        acc, p16, slot_before = before or no_step
        if before:
            plgpu.barrier_wait(group.buffers.v_full.at[slot_before])

        def finish_scores(s, bias):
            plgpu.barrier_arrive(group.buffers.k_free.at[slot])
            return finish(s, bias)

        def wait_next_keys():
            first()

            # Where the softmax ends: the branch keeps the compiler from waiting for the products any sooner.
            @pl.when(more)
            def _():
                plgpu.barrier_wait(group.buffers.k_full.at[group.slot(slot + 1)])

        if launch.emulate:
            s = group.emulated_scores(queries, slot)
            if before:
                acc = group.emulated_values(acc, p16, slot_before)
            plgpu.commit_smem()
            after = finish_scores(s, bias_of())
            wait_next_keys()
        else:

            def products(s_ref):
                group.start_scores(s_ref, queries, slot)
                weighted = group.start_values(acc, p16, slot_before) if before else None
                bias = bias_of()
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1 if before else 0)
                after = lax.optimization_barrier(finish_scores(s, bias))
                wait_next_keys()
                if before:
                    plgpu.wgmma_wait(0)
                return weighted, after

            acc, after = pl.run_scoped(products, ACC(SCORES, jnp.float32))
        p, *rest = after
        if before:
            # The rounded probabilities must not be written while the tensor cores read the last ones.
            acc, p = lax.optimization_barrier((acc, p))
            plgpu.barrier_arrive(group.buffers.v_free.at[slot_before])
        return acc, p, *rest

    def query_tile(item, carry):
        """All steps of a query tile but its first, then its last values beside the first scores of the next tile.

        The carry holds the first step's running maximum and sum and its probabilities. Tile -1, which has no step,
        begins the pipeline.
        """
        step0, m, total, p16 = carry
        this = jnp.maximum(item, 0)
        steps, next_steps = steps_of(item), steps_of(item + 1)
        no_bias = jnp.where(steps > 0, group.work(this, tables.STEPS_NO_BIAS), 0)
        rows_valid = group.work(this, tables.ROWS_VALID)
        queries = group.queries(this)

        def slot_of(step):
            return group.slot(step0 + step)

        def release_queries(when):
            pl.when((item > 0) & when)(lambda: group.release_queries(this))

        def next_step(biased: bool):
            def body(step, carry):
                acc, m, total, p16 = carry
                acc, p, m_new, added = multiply(
                    queries,
                    slot_of(step),
                    (acc, p16, slot_of(step - 1)),
                    lambda s, bias: group.softmax(s, m, bias),
                    more=(step + 1 < steps) | (next_steps > 0),
                    first=lambda: release_queries(step == 1),
                    bias_of=(lambda: group.bias(slot_of(step))) if biased else lambda: None,
                )
                acc, total = rescaled((acc, total), m, m_new, emulate=launch.emulate)
                return acc, m_new, total + added, p.astype(launch.dtype)

            return body

        carry = group.zeros(), m, total, p16
        carry = lax.fori_loop(jnp.int32(1), no_bias, next_step(biased=False), carry)
        acc, m, total, p16 = lax.fori_loop(no_bias, steps, next_step(biased=True), carry)
        release_queries(steps < 2)

        def first_of_next(before):
            acc, p, m, total = multiply(
                group.queries(item + 1), slot_of(steps), before, group.diagonal, more=next_steps > 1
            )
            return acc, m, total, p.astype(launch.dtype)

        def last_and_first():
            return first_of_next((acc, p16, slot_of(steps - 1)))

        def last_step():
            return group.add_values(acc, p16, slot_of(steps - 1))

        def first_step():
            plgpu.barrier_wait(group.buffers.k_full.at[slot_of(steps)])
            return first_of_next(None)[1:]

        def apart():
            return lax.cond(steps > 0, last_step, lambda: acc), *lax.cond(next_steps > 0, first_step, group.nothing)

        pl.when(item + 1 < share)(lambda: group.wait_queries(item + 1))

        @pl.when((steps == 1) & (next_steps > 0))
        def _():
            # A lone step does not wait for the keys of the next tile: they come after queries whose buffer the output
            # of the tile before has to leave first.
            plgpu.barrier_wait(group.buffers.k_full.at[slot_of(steps)])

        acc, *carry = lax.cond((steps > 0) & (next_steps > 0), last_and_first, apart)
        pl.when(item >= 0)(lambda: group.store(this, acc, m, total, rows_valid))
        return step0 + steps, *carry

    lax.fori_loop(jnp.int32(-1), share, query_tile, (jnp.int32(0), *group.nothing()))
    group.finish()
