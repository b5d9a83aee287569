"""What a compute warpgroup does with the 64 query rows that are its own: products, softmax and results of one step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.buffers import QUERY_BUFFERS, Buffers
from pallas_kernels.hopper.config import COMPUTE_WARPGROUPS, ROWS, STEP_KEYS
from pallas_kernels.hopper.launch import (
    Launch,
    item_of,
    share_of,
    split_head,
)
from pallas_kernels.hopper.product import start_product
from pallas_kernels.hopper.registers import SUM_COLUMNS, exp2, folded, raised
from pallas_kernels.launches import Refs, swizzle_of, tile_transforms
from pallas_kernels.sizes import QUERY_TILE

LAYOUT = plgpu.Layout.WGMMA
SCORES = (ROWS, STEP_KEYS)


def rows_to(values, shape):
    """A value for each row, in every column."""
    return lax.broadcast_in_dim(values, shape, [0])


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """One compute warpgroup of a thread block: number `index`, with the block's arrays, buffers and barriers.

    An `item` is the number of a query tile among those of the thread block; `count` numbers steps over all of them.
    """

    launch: Launch
    refs: Refs
    buffers: Buffers
    index: jax.Array

    def slot(self, count: jax.Array) -> jax.Array:
        """The buffers of a step."""
        return lax.rem(count, jnp.int32(self.launch.config.stages))

    def share(self) -> jax.Array:
        """Query tiles of this thread block."""
        return share_of(self.launch)

    def work(self, item: jax.Array, field: int) -> jax.Array:
        """A field of `KernelTables.work`."""
        z, tile = item_of(self.launch, self.refs, item)
        return self.refs.work[z, tile, field]

    def queries(self, item: jax.Array) -> Any:
        """The query rows, whose buffer their results are written to as well."""
        return self.buffers.q_smem.at[lax.rem(item, jnp.int32(QUERY_BUFFERS)) * COMPUTE_WARPGROUPS + self.index]

    def wait_queries(self, item: jax.Array) -> None:
        plgpu.barrier_wait(self.buffers.q_full.at[lax.rem(item, jnp.int32(QUERY_BUFFERS))])

    def release_queries(self, item: jax.Array) -> None:
        """The results of the query tile before have left its buffer, which the memory warpgroup may fill again."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.buffers.q_free.at[1 - lax.rem(item, jnp.int32(QUERY_BUFFERS))])

    def zeros(self):
        """Weighted values of no keys."""
        return plgpu.layout_cast(jnp.zeros((ROWS, self.launch.head_dim), jnp.float32), LAYOUT)

    def nothing(self):
        """Running maxima, sums and probabilities where there are none."""
        row = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), LAYOUT.reduce(1))
        total = plgpu.layout_cast(jnp.zeros((ROWS, SUM_COLUMNS), jnp.float32), LAYOUT)
        return row, total, plgpu.layout_cast(jnp.zeros(SCORES, self.launch.dtype), LAYOUT)

    def start_scores(self, s_ref: Any, queries: Any, slot: jax.Array) -> None:
        """Queues the products of queries and keys, part by part of head_dim."""
        width = self.launch.part_width
        for part in range(self.launch.parts):
            columns = pl.ds(part * width, width)
            plgpu.wgmma(s_ref, queries.at[:, columns], self.buffers.k_smem.at[slot, part].transpose((1, 0)))

    def start_values(self, acc, p16, slot: jax.Array):
        """Queues the product of probabilities and values; the sum is there after the next wait."""
        transforms, swizzle = tile_transforms(self.launch.head_dim), swizzle_of(self.launch.head_dim)
        return start_product(acc, p16, self.buffers.v_smem.at[slot], transforms, swizzle)

    def emulated_scores(self, queries: Any, slot: jax.Array):
        return jnp.dot(queries[...], self._rows(self.buffers.k_smem, slot).T, preferred_element_type=jnp.float32)

    def emulated_values(self, acc, p16, slot: jax.Array):
        return acc + jnp.dot(p16, self._rows(self.buffers.v_smem, slot), preferred_element_type=jnp.float32)

    def _rows(self, smem: Any, slot: jax.Array):
        return jnp.concatenate([smem[slot, part] for part in range(self.launch.parts)], 1)

    def add_values(self, acc, p16, slot: jax.Array):
        """Weighted values with those of one step, waited for."""
        plgpu.barrier_wait(self.buffers.v_full.at[slot])
        if self.launch.emulate:
            product = self.emulated_values(acc, p16, slot)
            plgpu.commit_smem()
        else:
            product = self.start_values(acc, p16, slot)
            plgpu.wgmma_wait(0)
            product = lax.optimization_barrier(product)
        plgpu.barrier_arrive(self.buffers.v_free.at[slot])
        return product

    def bias(self, slot: jax.Array):
        """The bias of a step, a value for each key."""
        plgpu.barrier_wait(self.buffers.bias_full.at[slot])
        bias = plgpu.load(self.buffers.bias_smem.at[slot], layout=LAYOUT.reduce(0), optimized=False)
        plgpu.commit_smem()  # before the next copy into it, which follows the keys' being free
        return bias

    def diagonal(self, s, _):
        """Softmax under the causal mask. Each row sees its own key, so the maximum is finite from here on.

        **Returns:** as `softmax`.
        """
        row = plgpu.broadcasted_iota(jnp.int32, SCORES, 0, layout=LAYOUT) + self.index * ROWS
        s = jnp.where(row >= plgpu.broadcasted_iota(jnp.int32, SCORES, 1, layout=LAYOUT), s, -jnp.inf)
        return self._relative_to(s, s.max(axis=1) * self.log2_scale)

    def softmax(self, s, m, bias):
        """Probabilities of one step relative to the running maxima, the maxima, and the probabilities' sums.

        **Arguments:** `s`: scores; `m`: the maxima before; `bias`: as `bias` returns it, or None.
        """
        if bias is not None:
            s = s + lax.broadcast_in_dim(bias.astype(jnp.float32), SCORES, [1])
        return self._relative_to(s, raised(m, s, self.log2_scale, emulate=self.launch.emulate))

    def _relative_to(self, s, m):
        polynomials = self.launch.config.polynomials(self.launch.head_dim)
        p = exp2(s * self.log2_scale - rows_to(m, SCORES), polynomials, emulate=self.launch.emulate)
        return p, m, folded(p, emulate=self.launch.emulate)

    @property
    def log2_scale(self) -> float:
        return self.launch.scale * math.log2(math.e)

    def store(self, item: jax.Array, acc, m, total, rows_valid: jax.Array) -> None:
        """Writes the results of a query tile: weighted values over sums, and zero from row `rows_valid` on."""
        z, tile = item_of(self.launch, self.refs, item)
        queries = self.queries(item)
        total = total.sum(axis=1)
        limit = rows_valid - self.index * ROWS
        row = plgpu.broadcasted_iota(jnp.int32, acc.shape, 0, layout=LAYOUT)
        queries[...] = jnp.where(row < limit, acc * rows_to(1 / total, acc.shape), 0.0).astype(self.launch.dtype)
        if self.buffers.lse_smem is not None:
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=LAYOUT.reduce(1))
            self.buffers.lse_smem[self.index] = jnp.where(row < limit, m * math.log(2) + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        batch, head, _ = split_head(self.launch, z)
        rows = pl.ds(tile * QUERY_TILE + self.index * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(queries, self.refs.out.at[batch, rows, head])
        if self.buffers.lse_smem is not None:
            plgpu.copy_smem_to_gmem(self.buffers.lse_smem.at[self.index], self.refs.lse.at[z, rows])

    def finish(self) -> None:
        """Waits for the last results, so that every buffer that was filled is free when the block ends."""
        share = self.share()

        @pl.when(share > 0)
        def _():
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(self.buffers.q_free.at[lax.rem(share - 1, jnp.int32(QUERY_BUFFERS))])
