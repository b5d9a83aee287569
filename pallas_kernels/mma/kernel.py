"""The Mosaic GPU kernel body: one thread block of four warps computes 64 or 128 query rows of one head.

The same four warps copy and compute. A step waits for its keys, starts the copies of a later step into the buffers that
the step before has left, and takes its scores, softmax and weighted values. Two thread blocks share a multiprocessor
where its memory allows, so that one computes while the other waits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import axes, tables
from pallas_kernels.hopper.registers import SUM_COLUMNS, raised, rescaled
from pallas_kernels.launches import Refs, item_at
from pallas_kernels.mma import product
from pallas_kernels.mma.launch import Launch, views
from pallas_kernels.mma.load import Loader, Steps
from pallas_kernels.mma.softmax import probabilities


def kernel_body(launch: Launch, refs: Refs, scratch: dict[str, Any]) -> None:
    """What one thread block does."""
    z, per_tile = lax.axis_index(axes.HEAD), jnp.int32(launch.blocks_per_tile)
    late, part = (op(lax.axis_index(axes.BLOCK), per_tile) for op in (lax.div, lax.rem))
    part = per_tile - 1 - part
    if refs.order is None:
        tile = launch.query_tiles - 1 - late
    else:
        z, tile = item_at(refs, launch.query_tiles, z * launch.query_tiles + late)
    head = lax.rem(z, jnp.int32(launch.heads))
    kv_head = lax.div(head, jnp.int32(launch.heads // launch.kv_heads))
    steps = Steps(launch, refs, lax.div(z, jnp.int32(launch.heads)), head, kv_head, z, tile, part)
    rows_valid = steps.counts[tables.ROWS_VALID] - part * launch.config.rows
    rows = Rows(launch, Loader(steps, **scratch))
    pl.when(rows_valid > 0)(lambda: rows.attend(rows_valid))
    pl.when(rows_valid <= 0)(lambda: rows.store_nothing(rows_valid))


class Rows:
    """The query rows of one thread block: products, online softmax and results."""

    def __init__(self, launch: Launch, loader: Loader) -> None:
        self.launch, self.loader = launch, loader
        self.acc = product.LAYOUT
        self.k_smem, self.v_smem = (views(ref, launch)[1] for ref in (loader.k_smem, loader.v_smem))

    def attend(self, rows_valid: jax.Array) -> None:
        """All steps, and the results."""
        loader, steps, stages = self.loader, self.loader.steps, self.launch.config.stages
        plain, _, end = steps.ends
        loader.fetch_queries()
        for step in range(stages - 1):
            loader.fetch(jnp.int32(step), steps.position(jnp.int32(step)), diagonal=True)
        loader.wait_queries()
        queries = self.queries()

        def next_step(kind: str):
            def body(step, carry):
                start, m, sums = carry
                total, *accs = self.in_pairs(sums)
                slot = lax.rem(step, jnp.int32(stages))
                loader.wait(slot)
                loader.fetch(step + (stages - 1), start, diagonal=kind == "masked")
                start = steps.position(step + stages)  # read the lists one step ahead of their use
                s = self.scores(queries, slot)
                if kind == "masked":
                    s = self.masked(s, step * self.launch.config.step_keys)
                if kind == "biased":
                    bias = loader.bias(step, self.acc.reduce(0))
                    s = s + lax.broadcast_in_dim(bias.astype(jnp.float32), s.shape, [1])
                before, m = m, raised(m, s, self.log2_scale, emulate=self.launch.emulate)
                total, *accs = rescaled((total, *accs), before, m, emulate=self.launch.emulate)
                p, total = probabilities(s, m, total, self.log2_scale, self.launch.dtype, emulate=self.launch.emulate)
                return start, m, one_by_one((total, *self.weighted(p, accs, slot)))

            return body

        m, *sums = self.nothing()
        carry = (steps.position(jnp.int32(stages - 1)), m, one_by_one(sums))
        first = jnp.int32(steps.masked)
        carry = lax.fori_loop(jnp.int32(0), first, next_step("masked"), carry)
        carry = lax.fori_loop(first, plain, next_step("plain"), carry)
        _, m, sums = lax.fori_loop(plain, end, next_step("biased"), carry)
        total, *accs = self.in_pairs(sums)
        self.store(m, total, accs, rows_valid)

    def in_pairs(self, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Arrays of `one_by_one` in the layout of products."""
        return tuple(plgpu.layout_cast(x, self.acc) for x in sums)

    def store_nothing(self, rows_valid: jax.Array) -> None:
        m, total, *accs = self.nothing()
        self.store(m, total, accs, rows_valid)

    def nothing(self) -> tuple[Any, ...]:
        """Running maxima, sums and weighted values (one array for each part of head_dim) of no keys."""
        rows = self.launch.config.rows
        m = plgpu.layout_cast(jnp.full((rows,), -3e38, jnp.float32), self.acc.reduce(1))
        widths = [SUM_COLUMNS] + [self.launch.part_width] * self.launch.parts
        return m, *(plgpu.layout_cast(jnp.zeros((rows, width), jnp.float32), self.acc) for width in widths)

    def queries(self) -> Any:
        """The query rows in registers, part by part of head_dim, or None to read them in every step."""
        if not self.launch.config.queries_in_registers or self.launch.emulate:
            return None
        layout = plgpu.Layout.MMA_LHS(self.launch.dtype)
        return tuple(plgpu.load(self.loader.q_smem.at[part], layout=layout) for part in range(self.launch.parts))

    def scores(self, queries: Any, slot: jax.Array) -> jax.Array:
        """Products of the queries and the keys of a step."""
        launch = self.launch
        if not launch.emulate:
            return product.scores(
                queries or self.loader.q_smem,
                self.k_smem.at[slot],
                launch.config.rows,
                launch.transforms,
                launch.swizzle,
            )
        s = jnp.zeros((launch.config.rows, launch.config.step_keys), jnp.float32)
        for part in range(launch.parts):
            q, k = self.loader.q_smem[part], self.k_smem[slot, part]
            s = s + jnp.dot(q, k.T, preferred_element_type=jnp.float32)
        return s

    def masked(self, s: jax.Array, first_key: jax.Array) -> jax.Array:
        """The scores of a step of the diagonal under the causal mask. Each row sees a key of the first of them."""
        if not self.launch.emulate:
            return product.causal(s, first_key)
        row, key = (lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (0, 1))
        return jnp.where(row >= key + first_key, s, -jnp.inf)

    def weighted(self, p: jax.Array, accs: list[jax.Array], slot: jax.Array) -> Any:
        """Weighted values with those of one step."""
        launch = self.launch
        if not launch.emulate:
            return product.weighted(tuple(accs), p, self.v_smem.at[slot], launch.transforms, launch.swizzle)
        dots = [jnp.dot(p, self.v_smem[slot, i], preferred_element_type=jnp.float32) for i in range(launch.parts)]
        return [acc + dot for acc, dot in zip(accs, dots, strict=True)]

    @property
    def log2_scale(self) -> float:
        return self.launch.scale * math.log2(math.e)

    def store(self, m: jax.Array, total: jax.Array, accs: list[jax.Array], rows_valid: jax.Array) -> None:
        """Writes weighted values over sums, and zero from row `rows_valid` on."""
        steps, refs, launch = self.loader.steps, self.loader.steps.refs, self.launch
        total = total.sum(axis=1)
        for part, acc in enumerate(accs):
            row = plgpu.broadcasted_iota(jnp.int32, acc.shape, 0, layout=self.acc)
            out = jnp.where(row < rows_valid, acc * lax.broadcast_in_dim(1 / total, acc.shape, [0]), 0.0)
            columns = pl.ds(part * launch.part_width, launch.part_width)
            _write(refs.out.at[steps.sequence, steps.rows(), steps.head, columns], out.astype(launch.dtype))
        if refs.lse is not None:
            row = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=self.acc.reduce(1))
            lse = jnp.where(row < rows_valid, m * math.log(2) + jnp.log(total), -jnp.inf)
            _write(refs.lse.at[steps.z, steps.rows()], lse)


def one_by_one(sums: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Running sums as loops carry them: each number of a thread by itself.

    Loops carry the pairs of `product.LAYOUT` in 64-bit registers from compute capability 10.0 on. Four 32-bit registers
    in a row, which products want, then take moves: 200 of the 860 instructions of a step at head_dim 256.
    """
    return tuple(plgpu.layout_cast(x, product.SINGLES) for x in sums)


def _write(target: Any, values: jax.Array) -> None:
    """Stores registers to device memory. jax 0.12 wants to be told that they make 4-byte stores."""
    if hasattr(plgpu, "store"):
        plgpu.store(target, values, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        target[...] = values
