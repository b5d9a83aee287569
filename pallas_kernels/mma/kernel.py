"""The Mosaic GPU kernel body: one thread block of four warps computes 64 or 128 query rows of one head.

The same four warps copy and compute. A step waits for its keys, starts the copies of a later step into the buffers that
the step before has left, and takes its scores, softmax and weighted values. Two thread blocks share a multiprocessor
where its memory allows, so that one computes while the other waits.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tables
from pallas_kernels.hopper.registers import SUM_COLUMNS, folded, raised, rescaled
from pallas_kernels.mma import product
from pallas_kernels.mma.launch import Launch, Refs, views
from pallas_kernels.mma.load import Loader, Steps


def kernel_body(launch: Launch, refs: Refs, scratch: dict[str, Any]) -> None:
    """What one thread block does."""
    z, late = lax.axis_index("head"), lax.axis_index("block")
    # Late query tiles have the most work: they come first.
    block = launch.query_tiles * launch.blocks_per_tile - 1 - late
    tile, part = (op(block, jnp.int32(launch.blocks_per_tile)) for op in (lax.div, lax.rem))
    head = lax.rem(z, jnp.int32(launch.heads))
    kv_head = lax.div(head, jnp.int32(launch.heads // launch.kv_heads))
    steps = Steps(launch, refs, lax.div(z, jnp.int32(launch.heads)), head, kv_head, z, tile, part)
    rows_valid = steps.counts[tables.ROWS_VALID] - part * launch.config.rows
    rows = Rows(launch, Loader(steps, **scratch))
    pl.when(rows_valid > 0)(lambda: rows.attend(rows_valid))
    pl.when(rows_valid <= 0)(lambda: rows.store(*rows.nothing(), rows_valid))


class Rows:
    """The query rows of one thread block: products, online softmax and results."""

    def __init__(self, launch: Launch, loader: Loader) -> None:
        self.launch, self.loader = launch, loader
        self.acc = product.LAYOUT
        self.k_smem, self.v_smem = (views(ref, launch)[1] for ref in (loader.k_smem, loader.v_smem))

    def attend(self, rows_valid: jax.Array) -> None:
        """All steps, and the results."""
        loader, steps, stages = self.loader, self.loader.steps, self.launch.config.stages
        plain, end = steps.ends()

        def fetch(step, start):
            """Of a step known to be of the diagonal if `step` is a Python int."""
            if isinstance(step, int) and step < steps.masked:
                own = steps.counts[tables.DIAGONAL] + steps.part * self.launch.config.rows
                loader.fetch(jnp.int32(step), own + step * self.launch.config.step_keys, None, end)
            else:
                loader.fetch(jnp.int32(step), start, plain, end)

        loader.fetch_queries()
        for step in range(stages - 1):
            fetch(step, None if step < steps.masked else steps.position(jnp.int32(step)))
        if loader.q_full is not None:
            plgpu.barrier_wait(loader.q_full)
        queries: Any = None

        m, total, *accs = self.nothing()
        start = steps.position(jnp.int32(max(stages - 1, steps.masked)))
        for step in range(steps.masked):
            slot = jnp.int32(step % stages)
            loader.wait(slot)
            if step == 0:
                queries = self.queries()
            ahead = step + stages - 1
            fetch(ahead, start)
            if ahead >= steps.masked:
                start = steps.position(jnp.int32(ahead + 1))
            s = self.diagonal(self.scores(queries, slot), step)
            before, m = m, s.max(axis=1) * self.log2_scale if step == 0 else self.raised(m, s)
            m, total, accs = self.weigh(s, before if step else None, m, total, accs, slot)

        def next_step(biased: bool):
            def body(step, carry):
                start, m, total, *accs = carry
                slot = lax.rem(step, jnp.int32(stages))
                loader.wait(slot)
                fetch(step + (stages - 1), start)
                start = steps.position(step + stages)  # read the lists one step ahead of their use
                s = self.scores(queries, slot)
                if biased:
                    bias = loader.bias(step, self.acc.reduce(0))
                    s = s + lax.broadcast_in_dim(bias.astype(jnp.float32), s.shape, [1])
                m, total, accs = self.weigh(s, m, self.raised(m, s), total, accs, slot)
                return start, m, total, *accs

            return body

        carry = lax.fori_loop(jnp.int32(steps.masked), plain, next_step(biased=False), (start, m, total, *accs))
        _, m, total, *accs = lax.fori_loop(plain, end, next_step(biased=True), carry)
        self.store(m, total, *accs, rows_valid)

    def nothing(self) -> tuple[Any, ...]:
        """Running maxima, sums and weighted values (one array for each part of head_dim) of no keys."""
        rows = self.launch.config.rows
        m = plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), self.acc.reduce(1))
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

    def diagonal(self, s: jax.Array, step: int) -> jax.Array:
        """The scores of a step of the diagonal under the causal mask. Each row sees its first key in step 0."""
        first_key = step * self.launch.config.step_keys
        if not self.launch.emulate:
            return product.causal(s, first_key)
        row, key = (lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (0, 1))
        return jnp.where(row >= key + first_key, s, -jnp.inf)

    def raised(self, m: jax.Array, s: jax.Array) -> jax.Array:
        return raised(m, s, self.log2_scale, emulate=self.launch.emulate)

    def weigh(self, s, before, m, total, accs, slot):
        """Sums with those of one step: its scores `s`, the running maxima `before` (None: no sums yet) and now."""
        p = jnp.exp2(s * self.log2_scale - lax.broadcast_in_dim(m, s.shape, [0]))
        if before is not None:
            total, *accs = rescaled((total, *accs), before, m, emulate=self.launch.emulate)
        total = total + folded(p, emulate=self.launch.emulate)
        p = p.astype(self.launch.dtype)
        launch = self.launch
        if not launch.emulate:
            values = self.v_smem.at[slot]
            return m, total, product.weighted(tuple(accs), p, values, launch.transforms, launch.swizzle)
        dots = [jnp.dot(p, self.v_smem[slot, i], preferred_element_type=jnp.float32) for i in range(launch.parts)]
        return m, total, [acc + dot for acc, dot in zip(accs, dots, strict=True)]

    @property
    def log2_scale(self) -> float:
        return self.launch.scale * math.log2(math.e)

    def store(self, m, total, *accs_and_valid) -> None:
        """Writes weighted values over sums, and zero from row `rows_valid` on (the last argument)."""
        *accs, rows_valid = accs_and_valid
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


def _write(target: Any, values: jax.Array) -> None:
    """Stores registers to device memory. jax 0.12 wants to be told that they make 4-byte stores."""
    if hasattr(plgpu, "store"):
        plgpu.store(target, values, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        target[...] = values
