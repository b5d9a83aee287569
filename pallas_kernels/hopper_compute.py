"""The compute warpgroups: online softmax of 64 query rows each.

The scores of a step are computed beside the weighted values of the step before, and its softmax runs while the tensor
cores still work on those values: the two matrix products and the softmax of one warpgroup overlap, and so do the two
warpgroups.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]

from pallas_kernels import hopper_tables as tables
from pallas_kernels.hopper_config import COMPUTE_WARPGROUPS, ROWS, STEP_KEYS
from pallas_kernels.hopper_launch import Launch, Refs, item_of, share_of, split_head, views
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE


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
    turn,
    lse_smem=None,
):
    """A compute warpgroup: online softmax of its 64 rows over the steps of every query tile."""
    stages, parts, width = launch.config.stages, launch.parts, launch.part_width
    k_smem, v_smem = views(k_smem, launch)[1], views(v_smem, launch)[1]
    log2_scale = launch.scale * math.log2(math.e)
    layout = plgpu.Layout.WGMMA
    shape = (ROWS, STEP_KEYS)

    take_turns = launch.config.takes_turns(launch.head_dim)

    def wait_turn():
        if take_turns:
            plgpu.barrier_wait(turn.at[warpgroup])

    def pass_turn():
        if take_turns:
            plgpu.barrier_arrive(turn.at[1 - warpgroup])

    def rows_to(values, shape):
        return lax.broadcast_in_dim(values, shape, [0])

    def start_scores(s_ref, queries, slot):
        """Queues the products of queries and keys, part by part of head_dim."""
        for part in range(parts):
            plgpu.wgmma(s_ref, queries.at[part], k_smem.at[slot, part].transpose((1, 0)))

    def emulated_scores(queries, slot):
        return sum(jnp.dot(queries[i], k_smem[slot, i].T, preferred_element_type=jnp.float32) for i in range(parts))

    def emulated_values(acc, p16, slot):
        return tuple(
            a + jnp.dot(p16, v_smem[slot, part], preferred_element_type=jnp.float32) for part, a in enumerate(acc)
        )

    def query_tile(index, step0):
        z, tile = item_of(launch, index)
        no_bias = refs.work[z, tile, tables.STEPS_NO_BIAS]
        steps = refs.work[z, tile, tables.STEPS]
        whole = refs.work[z, tile, tables.TILES]
        rows_valid = refs.work[z, tile, tables.ROWS_VALID]
        buffer = lax.rem(index, jnp.int32(2))
        queries = q_smem.at[buffer * COMPUTE_WARPGROUPS + warpgroup]

        def slot_of(step):
            return lax.rem(step0 + step, jnp.int32(stages))

        def bias_of(step):
            place = 2 * step - 2 - whole  # of the step's first half among the columns; negative for whole tiles
            start = pl.multiple_of((place + 2) * KEY_TILE, KEY_TILE)
            row = (z if refs.bias.shape[0] > 1 else 0, tile if refs.bias.shape[1] > 1 else 0)
            return plgpu.load(refs.bias.at[(*row, pl.ds(start, STEP_KEYS))], layout=layout.reduce(0), optimized=False)

        def zeros():
            return tuple(plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), layout) for _ in range(parts))

        def softmax(s, m, total):
            """Probabilities of one step, the factor for what came before it, and the new running maximum and sum."""
            m_new = jnp.maximum(m, s.max(axis=1) * log2_scale)
            factor = jnp.exp2(m - m_new)
            p = jnp.exp2(s * log2_scale - rows_to(m_new, shape))
            return p, factor, m_new, total * factor + p.sum(axis=1)

        def wait_next_keys(step):
            """Waits where the softmax ends: the branch keeps the compiler from waiting for the products any sooner."""

            @pl.when(step + 1 < steps)
            def _():
                plgpu.barrier_wait(k_full.at[slot_of(step + 1)])

        def first_step():
            """The diagonal, under the causal mask. Each row sees its own key, so the maximum is finite from here on."""
            plgpu.barrier_wait(k_full.at[slot_of(0)])
            wait_turn()
            if launch.emulate:
                s = emulated_scores(queries, slot_of(0))
                pass_turn()
                plgpu.commit_smem()
            else:

                def scores(s_ref):
                    start_scores(s_ref, queries, slot_of(0))
                    pass_turn()
                    return s_ref[...]

                s = pl.run_scoped(scores, ACC(shape, jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot_of(0)])
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + warpgroup * ROWS
            s = jnp.where(row >= plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout), s, -jnp.inf)
            m = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), layout.reduce(1))
            total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))
            p, _, m, total = softmax(s, m, total)
            wait_next_keys(jnp.int32(0))
            return zeros(), m, total, p.astype(launch.dtype)

        def next_step(biased: bool):
            """Scores of this step beside the weighted values of the one before, and then this step's softmax."""

            def body(step, carry):
                acc, m, total, p16 = carry
                slot, slot_before = slot_of(step), slot_of(step - 1)
                plgpu.barrier_wait(v_full.at[slot_before])
                wait_turn()

                def finish(s, bias):
                    plgpu.barrier_arrive(k_free.at[slot])
                    if bias is not None:
                        s = s + lax.broadcast_in_dim(bias.astype(jnp.float32), shape, [1])
                    return softmax(s, m, total)

                if launch.emulate:
                    s = emulated_scores(queries, slot)
                    acc = emulated_values(acc, p16, slot_before)
                    pass_turn()
                    plgpu.commit_smem()
                    p, factor, m_new, total_new = finish(s, bias_of(step) if biased else None)
                    wait_next_keys(step)
                else:

                    def products(s_ref, *acc_refs):
                        for acc_ref, a in zip(acc_refs, acc, strict=True):
                            acc_ref[...] = a
                        start_scores(s_ref, queries, slot)
                        for part, acc_ref in enumerate(acc_refs):
                            plgpu.wgmma(acc_ref, p16, v_smem.at[slot_before, part])
                        pass_turn()
                        bias = bias_of(step) if biased else None
                        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=parts)
                        after = lax.optimization_barrier(finish(s, bias))
                        wait_next_keys(step)
                        return tuple(acc_ref[...] for acc_ref in acc_refs), after

                    acc, (p, factor, m_new, total_new) = pl.run_scoped(
                        products, ACC(shape, jnp.float32), *[ACC((ROWS, width), jnp.float32)] * parts
                    )
                # The rounded probabilities must not be written while the tensor cores read the last ones.
                acc, p = lax.optimization_barrier((acc, p))
                plgpu.barrier_arrive(v_free.at[slot_before])
                acc = tuple(a * rows_to(factor, a.shape) for a in acc)
                return acc, m_new, total_new, p.astype(launch.dtype)

            return body

        def last_product(acc, p16):
            slot = slot_of(steps - 1)
            plgpu.barrier_wait(v_full.at[slot])
            wait_turn()
            if launch.emulate:
                acc = emulated_values(acc, p16, slot)
                pass_turn()
                plgpu.commit_smem()
            else:

                def product(acc_refs):
                    for part, acc_ref in enumerate(acc_refs):
                        plgpu.wgmma(acc_ref, p16, v_smem.at[slot, part])
                    pass_turn()

                acc = pl.run_state(product)(tuple(ACC.init(a) for a in acc))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc

        def release_queries():
            """The previous query tile's output has left its buffer, which the memory warpgroup may fill again."""

            @pl.when(index > 0)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free.at[1 - buffer])

        def attend():
            carry = first_step()
            release_queries()
            carry = lax.fori_loop(jnp.int32(1), no_bias, next_step(biased=False), carry)
            acc, m, total, p16 = lax.fori_loop(no_bias, steps, next_step(biased=True), carry)
            return last_product(acc, p16), m, total

        def skip():
            release_queries()
            nothing = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))
            return zeros(), nothing, nothing

        plgpu.barrier_wait(q_full.at[buffer])
        acc, m, total = lax.cond(steps > 0, attend, skip)

        limit = rows_valid - warpgroup * ROWS
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, width), 0, layout=layout)
        for part, a in enumerate(acc):
            queries[part] = jnp.where(row < limit, a * rows_to(1 / total, a.shape), 0.0).astype(launch.dtype)
        if lse_smem is not None:
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout.reduce(1))
            lse_smem[warpgroup] = jnp.where(row < limit, m * math.log(2) + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        batch, head, _ = split_head(launch, z)
        rows = pl.ds(tile * QUERY_TILE + warpgroup * ROWS, ROWS)
        for part in range(parts):
            columns = pl.ds(part * width, width)
            plgpu.copy_smem_to_gmem(queries.at[part], refs.out.at[batch, rows, head, columns])
        if lse_smem is not None:
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], refs.lse.at[z, rows])
        return step0 + steps

    @pl.when(warpgroup == 1)
    def _():
        pass_turn()

    share = share_of(launch)
    lax.fori_loop(jnp.int32(0), share, query_tile, jnp.int32(0))

    @pl.when(warpgroup == 0)
    def _():
        wait_turn()

    @pl.when(share > 0)
    def _():
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(q_free.at[lax.rem(share - 1, jnp.int32(2))])
