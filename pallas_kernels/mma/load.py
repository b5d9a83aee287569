"""Which keys each step of a thread block reads, and the copies that bring them: by cp.async or by TMA.

The steps of a query tile are, in order, its diagonal, band and block tiles, and gathered columns.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tables
from pallas_kernels.launches import Refs
from pallas_kernels.mma import copies
from pallas_kernels.mma.launch import Launch, views
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of one thread block, in the order in which it takes them.

    - `sequence`, `head`, `kv_head`, `z`: whose rows; z counts heads over all sequences.
    - `tile`: the query tile; `part`: which of its thread blocks this is.
    """

    launch: Launch
    refs: Refs
    sequence: jax.Array
    head: jax.Array
    kv_head: jax.Array
    z: jax.Array
    tile: jax.Array
    part: jax.Array

    @functools.cached_property
    def counts(self) -> dict[int, jax.Array]:
        """The query tile's row of `KernelTables.work`, read once: a step must not wait for device memory."""
        return {field: self.refs.work[self.z, self.tile, field] for field in range(tables.WORK_FIELDS)}

    @property
    def per_tile(self) -> int:
        """Steps of one key tile."""
        return KEY_TILE // self.launch.config.step_keys

    @property
    def masked(self) -> int:
        """Steps under the causal mask, the first ones."""
        return self.launch.config.rows // self.launch.config.step_keys

    @property
    def before(self) -> jax.Array:
        """Key tiles of the diagonal that this thread block's rows see whole: all that hold earlier rows of the tile."""
        return self.part * (self.launch.config.rows // KEY_TILE)

    @functools.cached_property
    def ends(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Where the steps without a bias end, those of whole tiles, and all."""
        fields = (tables.TILES_NO_BIAS, tables.TILES, tables.ALL_TILES)
        plain, whole, every = (self.masked + (self.counts[field] + self.before) * self.per_tile for field in fields)
        return plain, whole, every

    def rows(self) -> Any:
        """The query rows of this thread block."""
        config = self.launch.config
        return pl.ds(self.tile * QUERY_TILE + self.part * config.rows, config.rows)

    def place(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(place of a step's key tile among band, block and column tiles, its first key in that tile)."""
        after = step - self.masked
        place = lax.div(after, jnp.int32(self.per_tile)) - self.before
        return place, lax.rem(after, jnp.int32(self.per_tile)) * self.launch.config.step_keys

    def position(self, step: jax.Array) -> jax.Array:
        """First key of a step: its position, or its place among the columns."""
        refs = self.refs
        place, inside = self.place(jnp.maximum(step, self.masked))
        diagonal, whole = self.counts[tables.DIAGONAL], self.counts[tables.TILES]
        # A band that begins before key 0 is read from key 0 on; the bias hides the keys past its end.
        start = diagonal
        if refs.bands is not None:
            distance = refs.bands[self.z, jnp.clip(place, 0, refs.bands.shape[1] - 1)]
            start = jnp.maximum(diagonal - distance, 0)
        if refs.blocks is not None:
            bands = self.counts[tables.BANDS]
            block = refs.blocks[self.z, self.tile, jnp.clip(place - bands, 0, refs.blocks.shape[2] - 1)]
            start = jnp.where(place >= bands, block * KEY_TILE, start)
        if self.launch.blocks_per_tile > 1:
            start = jnp.where(place < 0, diagonal + (self.before + place) * KEY_TILE, start)
        start = jnp.where(place >= whole, (place - whole) * KEY_TILE, start) + inside
        own = diagonal + self.part * self.launch.config.rows + step * self.launch.config.step_keys
        return jnp.where(step < self.masked, own, start)

    def bias_row(self, step: jax.Array) -> Any:
        """The bias of a step's key tile, in device memory."""
        bias = self.refs.bias
        place, _ = self.place(step)
        columns = jnp.maximum(place - self.counts[tables.TILES] + 2, 0)  # -2 and -1 are the last whole tiles
        row = (self.z if bias.shape[0] > 1 else 0, self.tile if bias.shape[1] > 1 else 0)
        return bias.at[(*row, pl.ds(columns * KEY_TILE, KEY_TILE))]


@dataclasses.dataclass(frozen=True)
class Loader:
    """Brings queries, keys, values and bias into the shared memory of one thread block."""

    steps: Steps
    q_smem: Any
    k_smem: Any
    v_smem: Any
    bias_smem: Any
    q_full: Any = None
    kv_full: Any = None
    bias_full: Any = None

    @property
    def launch(self) -> Launch:
        return self.steps.launch

    def _copy(self, source: Any, target: Any, barrier: Any) -> None:
        """Copies rows `source` [rows, head_dim] into `target` [parts, rows, width]."""
        launch = self.launch
        if not launch.config.tma:
            copies.copy_rows(source, target, launch.transforms, launch.swizzle)
            return
        for part in range(launch.parts):
            columns = pl.ds(part * launch.part_width, launch.part_width)
            plgpu.copy_gmem_to_smem(source.at[:, columns], target.at[part], barrier)

    def fetch_queries(self) -> None:
        steps = self.steps
        self._copy(steps.refs.q.at[steps.sequence, steps.rows(), steps.head], self.q_smem, self.q_full)

    def wait_queries(self) -> None:
        """Waits for the queries. cp.async brings them in the first step's group."""
        if self.q_full is not None:
            plgpu.barrier_wait(self.q_full)
        elif self.launch.config.queries_in_registers:
            copies.wait_groups(self.launch.config.stages - 2)

    def fetch(self, step: jax.Array, start: jax.Array, *, diagonal: bool = False) -> None:
        """Starts the copies of a step, if there is one: keys, values and where it needs one its bias.

        **Arguments:** `start`: its first key, as `Steps.position`; `diagonal`: whether it may be one of the diagonal.
        """
        steps, refs, launch = self.steps, self.steps.refs, self.launch
        plain, whole, end = steps.ends
        slot = lax.rem(step, jnp.int32(launch.config.stages))
        full = None if self.kv_full is None else self.kv_full.at[slot]
        rows = pl.ds(start, launch.config.step_keys)
        buffers = [views(smem, launch)[0].at[slot] for smem in (self.k_smem, self.v_smem)]

        def copy_values():
            self._copy(refs.v.at[steps.sequence, rows, steps.kv_head], buffers[1], full)

        def copy_last_values():
            first = steps.part * launch.config.rows + step * launch.config.step_keys  # of the query tile's own keys
            inside = pl.ds(first, launch.config.step_keys)
            self._copy(refs.last_values.at[steps.sequence, inside, steps.kv_head], buffers[1], full)

        @pl.when(step < whole)
        def _():
            self._copy(refs.k.at[steps.sequence, rows, steps.kv_head], buffers[0], full)
            if not diagonal or refs.last_values is None:
                copy_values()
                return
            last = (step < steps.masked) & (steps.counts[tables.ROWS_VALID] < QUERY_TILE)
            lax.cond(last, copy_last_values, copy_values)

        if refs.keys is not None:

            @pl.when((step >= whole) & (step < end))
            def _():
                for source, smem in zip((refs.keys, refs.values), buffers, strict=True):
                    self._copy(source.at[steps.z, rows], smem, full)

        @pl.when((step >= plain) & (step < end))
        def _():
            if launch.config.tma:
                plgpu.copy_gmem_to_smem(steps.bias_row(step), self.bias_smem.at[slot], self.bias_full.at[slot])
            else:
                copies.copy_bias(steps.bias_row(step), self.bias_smem.at[slot])

        if not launch.config.tma:
            copies.end_group()

    def wait(self, slot: jax.Array) -> None:
        """Waits for the keys and values of a step, and for all warps to have read those of the step before.

        What is fetched into the buffers of the step before must come after this.
        """
        if not self.launch.config.tma:
            copies.wait_groups(self.launch.config.stages - 2)
            return
        plgpu.barrier_wait(self.kv_full.at[slot])
        plgpu.commit_smem()  # ordinary loads have read the other buffers: a proxy fence before TMA writes them again

    def bias(self, step: jax.Array, layout: Any) -> jax.Array:
        """The bias of a step, a value for each key."""
        slot = lax.rem(step, jnp.int32(self.launch.config.stages))
        if self.launch.config.tma:
            plgpu.barrier_wait(self.bias_full.at[slot])
        keys = pl.ds(self.steps.place(step)[1], self.launch.config.step_keys)
        return plgpu.load(self.bias_smem.at[slot, keys], layout=layout, optimized=False)
