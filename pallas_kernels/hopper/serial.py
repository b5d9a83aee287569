"""The compute warpgroups where `setmaxnreg` does nothing: one product after the other, in the registers there are.

A thread block of three warpgroups starts with 168 registers a thread. `compute` needs more, for which the
warpgroup that loads gives up its own; an assembler that ignores this request lets it spill and puts the products in
line anyway. Here nothing of a step is held until the next, and the two warpgroups overlap with each other alone.
"""

from __future__ import annotations

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
    launch = group.launch

    def weigh(queries, slot, finish, biased):
        """finish(scores, bias) of one step: its probabilities, and what comes with them."""
        plgpu.barrier_wait(group.buffers.k_full.at[slot])
        if launch.emulate:
            s = group.emulated_scores(queries, slot)
            bias = group.bias(slot) if biased else None
            plgpu.commit_smem()
            plgpu.barrier_arrive(group.buffers.k_free.at[slot])
            return finish(s, bias)

        def products(s_ref):
            group.start_scores(s_ref, queries, slot)
            bias = group.bias(slot) if biased else None
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=0)
            plgpu.barrier_arrive(group.buffers.k_free.at[slot])
            return lax.optimization_barrier(finish(s, bias))

        return pl.run_scoped(products, ACC(SCORES, jnp.float32))

    def query_tile(item, step0):
        steps = group.work(item, tables.STEPS)
        no_bias = group.work(item, tables.STEPS_NO_BIAS)
        rows_valid = group.work(item, tables.ROWS_VALID)
        queries = group.queries(item)

        def slot_of(step):
            return group.slot(step0 + step)

        def first_step():
            p, m, total = weigh(queries, slot_of(0), group.diagonal, biased=False)
            return group.add_values(group.zeros(), p.astype(launch.dtype), slot_of(0)), m, total

        def next_step(biased: bool):
            def body(step, carry):
                acc, m, total = carry
                slot = slot_of(step)
                p, m_new, added = weigh(queries, slot, lambda s, bias: group.softmax(s, m, bias), biased)
                acc, total = rescaled((acc, total), m, m_new, emulate=launch.emulate)
                return group.add_values(acc, p.astype(launch.dtype), slot), m_new, total + added

            return body

        group.wait_queries(item)
        carry = lax.cond(steps > 0, first_step, lambda: (group.zeros(), *group.nothing()[:2]))
        carry = lax.fori_loop(jnp.int32(1), no_bias, next_step(biased=False), carry)
        acc, m, total = lax.fori_loop(jnp.maximum(no_bias, 1), steps, next_step(biased=True), carry)
        pl.when(item > 0)(lambda: group.release_queries(item))
        group.store(item, acc, m, total, rows_valid)
        return step0 + steps

    lax.fori_loop(jnp.int32(0), group.share(), query_tile, jnp.int32(0))
    group.finish()
