"""The Mosaic GPU kernel body: two compute warpgroups and one memory warpgroup over one list of query tiles.

A pipeline step is 128 keys: two key tiles that need not be neighbours, copied by TMA into the two halves of one
buffer. The steps of a query tile are, in order,

1. the diagonal, under the causal mask;
2. band and block tiles, without any mask;
3. steps with a bias row of 0 and -inf: gathered columns, at most one whole tile paired with the first of them, and
   a missing second half.

Thread blocks are persistent: each walks its share of the query tiles, and its memory warpgroup runs ahead into the
next query tile while the compute warpgroups finish the last one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper_tables as tables
from pallas_kernels.hopper_config import COMPUTE_WARPGROUPS, ROWS, STEP_KEYS, KernelConfig
from pallas_kernels.plan import KEY_TILE, QUERY_TILE

_MEMORY = COMPUTE_WARPGROUPS  # index of the memory warpgroup


@dataclasses.dataclass(frozen=True)
class Launch:
    """Everything static about one launch. `emulate` replaces wgmma by jnp.dot, for the interpreter."""

    config: KernelConfig
    lanes: int  # thread blocks that take turns over neighbouring query tiles
    chain: int  # query tiles of one thread block
    heads: int
    kv_heads: int
    query_tiles: int
    work: int  # query tiles of all heads and sequences
    head_dim: int
    scale: float
    dtype: Any
    emulate: bool


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays in device memory. `blocks`, `keys`, `values` and `lse` may be None."""

    q: Any
    k: Any
    v: Any
    work: Any
    bands: Any
    bias: Any
    blocks: Any
    keys: Any
    values: Any
    out: Any
    lse: Any


def scratch_types(launch: Launch, with_lse: bool) -> dict[str, Any]:
    """Shared memory and barriers of one thread block."""
    stages, h, dtype = launch.config.stages, launch.head_dim, launch.dtype
    swizzle = 128 if h % 64 == 0 else 64
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))

    def matrix(*shape: int):
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    types = {
        "q_smem": matrix(2 * COMPUTE_WARPGROUPS, ROWS, h),
        "k_smem": matrix(stages, STEP_KEYS, h),
        "v_smem": matrix(stages, STEP_KEYS, h),
        "q_full": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2),
        "q_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2),
        "k_full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE_WARPGROUPS),
    }
    if with_lse:
        types["lse_smem"] = plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS), jnp.float32)
    return types


def kernel_body(launch: Launch, refs: Refs, scratch: dict[str, Any]) -> None:
    """What one thread block does."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _MEMORY)
    def _():
        plgpu.set_max_registers(launch.config.memory_registers, action="decrease")
        _load(launch, refs, **scratch)

    @pl.when(warpgroup < _MEMORY)
    def _():
        plgpu.set_max_registers(launch.config.compute_registers, action="increase")
        _compute(launch, refs, warpgroup, **scratch)


def _share(launch: Launch) -> jax.Array:
    """Number of query tiles that this thread block takes."""
    lanes, chain = launch.lanes, launch.chain
    left = launch.work - lax.div(lax.axis_index("block"), jnp.int32(lanes)) * (lanes * chain)
    rounds, rest = lax.div(left, jnp.int32(lanes)), lax.rem(left, jnp.int32(lanes))
    return jnp.where(rounds >= chain, chain, rounds + (_place(launch, rounds) < rest).astype(jnp.int32))


def _place(launch: Launch, turn: jax.Array) -> jax.Array:
    """This thread block's place in a round. Every other round runs backwards, so that long and short tiles balance."""
    lane = lax.rem(lax.axis_index("block"), jnp.int32(launch.lanes))
    return jnp.where(lax.rem(turn, jnp.int32(2)) == 1, launch.lanes - 1 - lane, lane)


def _item(launch: Launch, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(head of all sequences, query tile) of this thread block's `turn`-th item: heads slow, late tiles first."""
    round_ = lax.div(lax.axis_index("block"), jnp.int32(launch.lanes)) * launch.chain + turn
    index = round_ * launch.lanes + _place(launch, turn)
    z = lax.div(index, jnp.int32(launch.query_tiles))
    return z, launch.query_tiles - 1 - lax.rem(index, jnp.int32(launch.query_tiles))


def _split(launch: Launch, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sequence, query head, KV head)."""
    head = lax.rem(z, jnp.int32(launch.heads))
    return lax.div(z, jnp.int32(launch.heads)), head, lax.div(head, jnp.int32(launch.heads // launch.kv_heads))


def _load(launch: Launch, refs: Refs, *, q_smem, k_smem, v_smem, q_full, q_free, k_full, v_full, k_free, v_free, **_):
    """The memory warpgroup: walks the lists and issues every TMA load."""
    stages = launch.config.stages

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
        return smem.at[pl.ds(index * KEY_TILE, KEY_TILE)]

    def query_tile(turn, step0):
        z, tile = _item(launch, turn)
        batch, head, kv_head = _split(launch, z)
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

        def whole_tile(source, smem, full, key_tile):
            rows = pl.ds(key_tile * KEY_TILE, KEY_TILE)
            plgpu.copy_gmem_to_smem(source.at[batch, rows, kv_head], smem, full)

        def next_tile(place, pointer):
            """Key tile at `place` in the bands and then the blocks, and the next pointer into the blocks."""
            band = diagonal - refs.bands[z, jnp.minimum(place, refs.bands.shape[1] - 1)]
            if refs.blocks is None:
                return band, pointer
            last = refs.blocks.shape[2] - 1

            def from_blocks():
                def skipped(p):
                    return (p < last) & (refs.blocks[z, tile, p] < 0)

                found = lax.while_loop(skipped, lambda p: p + 1, jnp.minimum(pointer, last))
                return refs.blocks[z, tile, found], found + 1

            return lax.cond((place >= bands) & (place < whole), from_blocks, lambda: (band, pointer))

        def pair(step, pointer):
            first, pointer = next_tile(2 * step - 2, pointer)
            second, pointer = next_tile(2 * step - 1, pointer)
            return first, second, pointer

        def whole_step(step, carry):
            first, second, pointer = carry
            ahead = pair(step + 1, pointer)  # read the list one step ahead of its use
            total = step0 + step

            def copy(source, _, smem, full):
                whole_tile(source, half(smem, 0), full, first)
                whole_tile(source, half(smem, 1), full, second)

            fill(lax.rem(total, jnp.int32(stages)), total, copy)
            return ahead

        def bias_step(step, carry):
            first, _, _ = carry
            total = step0 + step
            place = 2 * step - 2 - whole  # -1: the first half is the last whole tile

            def copy(source, gathered, smem, full):
                if gathered is None:
                    # No columns: this is the last whole tile, and a half that the bias hides.
                    whole_tile(source, half(smem, 0), full, first)
                    whole_tile(source, half(smem, 1), full, diagonal)
                    return

                def columns(index, which):
                    rows = pl.ds(which * KEY_TILE, KEY_TILE)
                    plgpu.copy_gmem_to_smem(gathered.at[z, rows], half(smem, index), full)

                @pl.when(place < 0)
                def _():
                    whole_tile(source, half(smem, 0), full, first)

                @pl.when(place >= 0)
                def _():
                    columns(0, place)

                columns(1, place + 1)

            fill(lax.rem(total, jnp.int32(stages)), total, copy)
            return carry

        @pl.when(steps > 0)
        def _():
            # The diagonal is the pair of tiles "first" and "second" of step 0.
            carry = whole_step(jnp.int32(0), (diagonal, diagonal + 1, jnp.int32(0)))
            carry = lax.fori_loop(jnp.int32(1), no_bias, whole_step, carry)
            lax.fori_loop(no_bias, steps, bias_step, carry)

        return step0 + steps

    share = _share(launch)
    total = lax.fori_loop(jnp.int32(0), share, query_tile, jnp.int32(0))

    # Leave no arrival behind: every buffer that was filled has been read when the block ends.
    def drain(step, _):
        plgpu.barrier_wait(k_free.at[lax.rem(step, jnp.int32(stages))])
        plgpu.barrier_wait(v_free.at[lax.rem(step, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)

    def drain_queries(turn, _):
        plgpu.barrier_wait(q_free.at[lax.rem(turn, jnp.int32(2))])

    lax.fori_loop(jnp.maximum(share - 2, 0), share, drain_queries, None)


def _compute(
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
    stages, h = launch.config.stages, launch.head_dim
    log2_scale = launch.scale * math.log2(math.e)
    layout = plgpu.Layout.WGMMA
    shape = (ROWS, STEP_KEYS)

    def wait_turn():
        plgpu.barrier_wait(turn.at[warpgroup])

    def pass_turn():
        plgpu.barrier_arrive(turn.at[1 - warpgroup])

    def rows_to(values, shape):
        return lax.broadcast_in_dim(values, shape, [0])

    def query_tile(index, step0):
        z, tile = _item(launch, index)
        no_bias = refs.work[z, tile, tables.STEPS_NO_BIAS]
        steps = refs.work[z, tile, tables.STEPS]
        whole = refs.work[z, tile, tables.TILES]
        rows_valid = refs.work[z, tile, tables.ROWS_VALID]
        buffer = lax.rem(index, jnp.int32(2))
        queries = q_smem.at[buffer * COMPUTE_WARPGROUPS + warpgroup]

        def slot_of(step):
            return lax.rem(step0 + step, jnp.int32(stages))

        def bias_of(step):
            # The zeros in front of the columns stand for the last whole tile, if it has to share a step.
            start = pl.multiple_of((2 * step - 1 - whole) * KEY_TILE, KEY_TILE)
            source = refs.bias.at[0, 0] if refs.keys is None else refs.bias.at[z, tile, pl.ds(start, STEP_KEYS)]
            return plgpu.load(source, layout=layout.reduce(0), optimized=False)

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
                s = jnp.dot(queries[...], k_smem[slot_of(0)].T, preferred_element_type=jnp.float32)
                pass_turn()
                plgpu.commit_smem()
            else:

                def scores(s_ref):
                    plgpu.wgmma(s_ref, queries, k_smem.at[slot_of(0)].transpose((1, 0)))
                    pass_turn()
                    return s_ref[...]

                s = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot_of(0)])
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + warpgroup * ROWS
            s = jnp.where(row >= plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout), s, -jnp.inf)
            m = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), layout.reduce(1))
            total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))
            p, _, m, total = softmax(s, m, total)
            wait_next_keys(jnp.int32(0))
            acc = plgpu.layout_cast(jnp.zeros((ROWS, h), jnp.float32), layout)
            return acc, m, total, p.astype(launch.dtype)

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
                    s = jnp.dot(queries[...], k_smem[slot].T, preferred_element_type=jnp.float32)
                    acc = acc + jnp.dot(p16, v_smem[slot_before], preferred_element_type=jnp.float32)
                    pass_turn()
                    plgpu.commit_smem()
                    p, factor, m_new, total_new = finish(s, bias_of(step) if biased else None)
                    wait_next_keys(step)
                else:

                    def products(s_ref, acc_ref):
                        acc_ref[...] = acc
                        plgpu.wgmma(s_ref, queries, k_smem.at[slot].transpose((1, 0)))
                        plgpu.wgmma(acc_ref, p16, v_smem.at[slot_before])
                        pass_turn()
                        bias = bias_of(step) if biased else None
                        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                        after = lax.optimization_barrier(finish(s, bias))
                        wait_next_keys(step)
                        return acc_ref[...], after

                    acc, (p, factor, m_new, total_new) = pl.run_scoped(
                        products, plgpu.ACC(shape, jnp.float32), plgpu.ACC((ROWS, h), jnp.float32)
                    )
                # The rounded probabilities must not be written while the tensor cores read the last ones.
                acc, p = lax.optimization_barrier((acc, p))
                plgpu.barrier_arrive(v_free.at[slot_before])
                return acc * rows_to(factor, (ROWS, h)), m_new, total_new, p.astype(launch.dtype)

            return body

        def last_product(acc, p16):
            slot = slot_of(steps - 1)
            plgpu.barrier_wait(v_full.at[slot])
            wait_turn()
            if launch.emulate:
                acc = acc + jnp.dot(p16, v_smem[slot], preferred_element_type=jnp.float32)
                pass_turn()
                plgpu.commit_smem()
            else:

                def product(acc_ref):
                    plgpu.wgmma(acc_ref, p16, v_smem.at[slot])
                    pass_turn()

                acc = pl.run_state(product)(plgpu.ACC.init(acc))
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
            return plgpu.layout_cast(jnp.zeros((ROWS, h), jnp.float32), layout), nothing, nothing

        plgpu.barrier_wait(q_full.at[buffer])
        acc, m, total = lax.cond(steps > 0, attend, skip)

        limit = rows_valid - warpgroup * ROWS
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, h), 0, layout=layout)
        acc = jnp.where(row < limit, acc * rows_to(1 / total, (ROWS, h)), 0.0)
        queries[...] = acc.astype(launch.dtype)
        if lse_smem is not None:
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout.reduce(1))
            lse_smem[warpgroup] = jnp.where(row < limit, m * math.log(2) + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        batch, head, _ = _split(launch, z)
        rows = pl.ds(tile * QUERY_TILE + warpgroup * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(queries, refs.out.at[batch, rows, head])
        if lse_smem is not None:
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], refs.lse.at[z, rows])
        return step0 + steps

    @pl.when(warpgroup == 1)
    def _():
        pass_turn()

    share = _share(launch)
    lax.fori_loop(jnp.int32(0), share, query_tile, jnp.int32(0))

    @pl.when(warpgroup == 0)
    def _():
        wait_turn()

    @pl.when(share > 0)
    def _():
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(q_free.at[lax.rem(share - 1, jnp.int32(2))])
