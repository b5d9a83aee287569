"""The one warp that loads: it walks the lists of a plan and issues every TMA copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tables
from pallas_kernels.hopper.buffers import QUERY_BUFFERS, Buffers
from pallas_kernels.hopper.config import COMPUTE_WARPGROUPS, ROWS, STEP_KEYS
from pallas_kernels.hopper.launch import Launch, item_of, share_of, split_head
from pallas_kernels.launches import Refs
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE


@dataclasses.dataclass(frozen=True)
class _QueryTile:
    """Where one query tile lies in the arrays, and what its row of `KernelTables.work` says."""

    z: jax.Array
    tile: jax.Array
    batch: jax.Array
    head: jax.Array
    kv_head: jax.Array
    steps_no_bias: jax.Array
    steps: jax.Array
    bands: jax.Array
    whole: jax.Array  # band tiles and block tiles
    diagonal: jax.Array
    rows_valid: jax.Array

    @staticmethod
    def of(launch: Launch, refs: Refs, turn: jax.Array) -> _QueryTile:
        """The `turn`-th query tile of this thread block."""
        z, tile = item_of(launch, refs, turn)
        place = split_head(launch, z)
        fields = (tables.STEPS_NO_BIAS, tables.STEPS, tables.BANDS, tables.TILES, tables.DIAGONAL, tables.ROWS_VALID)
        return _QueryTile(z, tile, *place, *(refs.work[z, tile, field] for field in fields))


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where keys, or values, lie in device memory: all, those of columns, and those a sequence ends with (or None)."""

    all: Any
    gathered: Any
    last: Any


def load(launch: Launch, refs: Refs, buffers: Buffers) -> None:
    """Loads the queries of each of this thread block's tiles, then keys and values step by step."""
    loader = _Loader(launch, refs, buffers)
    share = share_of(launch)
    total = lax.fori_loop(jnp.int32(0), share, loader.query_tile, jnp.int32(0))
    loader.drain(share, total)


@dataclasses.dataclass(frozen=True)
class _Loader:
    """The loads of one thread block. `total` numbers steps over all of its query tiles; a step's slot is its rest."""

    launch: Launch
    refs: Refs
    buffers: Buffers

    def slot(self, total: jax.Array) -> jax.Array:
        """The buffers of a step."""
        return lax.rem(total, jnp.int32(self.launch.config.stages))

    def query_tile(self, turn: jax.Array, step0: jax.Array) -> jax.Array:
        """Loads everything of one query tile; its steps begin at number `step0`. Returns where the next one's begin."""
        at = _QueryTile.of(self.launch, self.refs, turn)
        self._queries(at, turn)

        @pl.when(at.steps > 0)
        def _():
            pair = self._diagonal_step(at, step0)
            pair = lax.fori_loop(jnp.int32(1), at.steps_no_bias, self._whole_step(at, step0), pair)
            lax.fori_loop(at.steps_no_bias, at.steps, self._bias_step(at, step0), pair)

        return step0 + at.steps

    def drain(self, share: jax.Array, total: jax.Array) -> None:
        """Leaves no arrival behind: every buffer that was filled has been read when the thread block ends."""
        buffers, stages = self.buffers, self.launch.config.stages

        def steps(step, _):
            plgpu.barrier_wait(buffers.k_free.at[self.slot(step)])
            plgpu.barrier_wait(buffers.v_free.at[self.slot(step)])

        lax.fori_loop(jnp.maximum(total - stages, 0), total, steps, None)

        def queries(turn, _):
            plgpu.barrier_wait(buffers.q_free.at[lax.rem(turn, jnp.int32(QUERY_BUFFERS))])

        lax.fori_loop(jnp.maximum(share - QUERY_BUFFERS, 0), share, queries, None)

    def _queries(self, at: _QueryTile, turn: jax.Array) -> None:
        buffers, buffer = self.buffers, lax.rem(turn, jnp.int32(QUERY_BUFFERS))

        # The buffer holds the results of the query tile two turns ago, until they have been written out.
        @pl.when(turn >= QUERY_BUFFERS)
        def _():
            plgpu.barrier_wait(buffers.q_free.at[buffer])

        for w in range(COMPUTE_WARPGROUPS):
            rows = pl.ds(at.tile * QUERY_TILE + w * ROWS, ROWS)
            target = buffers.q_smem.at[buffer * COMPUTE_WARPGROUPS + w]
            plgpu.copy_gmem_to_smem(self.refs.q.at[at.batch, rows, at.head], target, buffers.q_full.at[buffer])

    def _diagonal_step(self, at: _QueryTile, step0: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Loads step 0. Returns the first keys of the next one, as the loop over whole tiles carries them."""

        def copy(source, smem, full):
            halves = _half(smem, 0), _half(smem, 1)

            def whole():
                for index, into in enumerate(halves):
                    self._whole_tile(at, source.all, into, full, at.diagonal + index * KEY_TILE)

            def last():
                for index, into in enumerate(halves):
                    rows = pl.ds(index * KEY_TILE, KEY_TILE)
                    _copy_rows(
                        self.launch,
                        lambda columns, rows=rows: source.last.at[at.batch, rows, at.kv_head, columns],
                        into,
                        full,
                    )

            if source.last is None:
                whole()
            else:
                pl.when(at.rows_valid == QUERY_TILE)(whole)
                pl.when(at.rows_valid < QUERY_TILE)(last)

        self._fill(self.slot(step0), step0, copy)
        return self._pair_at(at, jnp.int32(1))

    def _whole_step(self, at: _QueryTile, step0: jax.Array) -> Callable[[Any, Any], Any]:
        """The body of a loop over steps of two whole key tiles, whose first keys are the carry."""

        def body(step, carry):
            first, second = carry
            # The lists are read one step ahead of their use.
            ahead = self._pair_at(at, step + 1)
            total = step0 + step

            def copy(source, smem, full):
                self._whole_tile(at, source.all, _half(smem, 0), full, first)
                self._whole_tile(at, source.all, _half(smem, 1), full, second)

            self._fill(self.slot(total), total, copy)
            return ahead

        return body

    def _bias_step(self, at: _QueryTile, step0: jax.Array) -> Callable[[Any, Any], Any]:
        """The body of a loop over steps with a bias row: columns, and whole tiles that share a step with them."""
        launch, refs, buffers = self.launch, self.refs, self.buffers

        def body(step, carry):
            first, second = carry
            total = step0 + step
            # Of the first half, among the columns' tiles; -2 and -1 are the last whole tiles, the carry.
            place = 2 * step - 2 - at.whole

            def copy(source, smem, full):
                for index, start in ((0, first), (1, second)):
                    into = _half(smem, index)
                    if source.gathered is None:
                        # The bias hides the keys of a missing second half, but not a NaN: those of the first are seen.
                        self._whole_tile(at, source.all, into, full, jnp.where(place + index < 0, start, first))
                        continue

                    @pl.when(place + index < 0)
                    def _(into=into, start=start):
                        self._whole_tile(at, source.all, into, full, start)

                    @pl.when(place + index >= 0)
                    def _(into=into, index=index):
                        rows = pl.ds((place + index) * KEY_TILE, KEY_TILE)
                        _copy_rows(launch, lambda columns: source.gathered.at[at.z, rows, columns], into, full)

            slot = self.slot(total)
            self._fill(slot, total, copy)
            # No barrier of its own says that the bias buffer is free: a compute warpgroup reads the bias before it
            # frees the keys beside it, and those were free just now.
            row = (at.z if refs.bias.shape[0] > 1 else 0, at.tile if refs.bias.shape[1] > 1 else 0)
            part = pl.ds((place + 2) * KEY_TILE, STEP_KEYS)
            plgpu.copy_gmem_to_smem(refs.bias.at[(*row, part)], buffers.bias_smem.at[slot], buffers.bias_full.at[slot])
            return carry

        return body

    def _fill(self, slot: jax.Array, total: jax.Array, copy: Callable[[_Source, Any, Any], None]) -> None:
        """Loads the keys and then the values of one step: waits until a buffer is free, then has `copy` fill it."""
        refs, buffers = self.refs, self.buffers
        for source, smem, free, full in (
            (_Source(refs.k, refs.keys, None), buffers.k_smem, buffers.k_free, buffers.k_full),
            (_Source(refs.v, refs.values, refs.last_values), buffers.v_smem, buffers.v_free, buffers.v_full),
        ):
            # The first `stages` steps find their buffers as the thread block started with them: free.
            @pl.when(total >= self.launch.config.stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[slot])

            copy(source, smem.at[slot], full.at[slot])

    def _pair_at(self, at: _QueryTile, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First keys of the two whole tiles of a step after the diagonal."""
        return self._tile_at(at, 2 * step - 2), self._tile_at(at, 2 * step - 1)

    def _tile_at(self, at: _QueryTile, place: jax.Array) -> jax.Array:
        """First key of the whole tile at `place`: among the bands, and past their count among the blocks.

        A band that begins before key 0 is read from key 0 on; the bias hides the keys past its end.
        """
        refs = self.refs
        band = at.diagonal
        if refs.bands is not None:
            distance = refs.bands[at.z, jnp.minimum(place, refs.bands.shape[1] - 1)]
            band = jnp.maximum(at.diagonal - distance, 0)
        if refs.blocks is None:
            return band
        block = jnp.clip(place - at.bands, 0, refs.blocks.shape[2] - 1)
        in_blocks = (place >= at.bands) & (place < at.whole)
        return lax.cond(in_blocks, lambda: refs.blocks[at.z, at.tile, block] * KEY_TILE, lambda: band)

    def _whole_tile(self, at: _QueryTile, source: Any, smem: Any, full: Any, start: jax.Array) -> None:
        """Copies the 64 keys (or values) from `start` on."""
        # The product proves to the compiler what `aligned` promises.
        rows = pl.ds(lax.div(start, jnp.int32(KEY_TILE)) * KEY_TILE if self.launch.aligned else start, KEY_TILE)
        _copy_rows(self.launch, lambda columns: source.at[at.batch, rows, at.kv_head, columns], smem, full)


def _half(smem: Any, index: int) -> Any:
    return smem.at[:, pl.ds(index * KEY_TILE, KEY_TILE)]


def _copy_rows(launch: Launch, source: Callable[[Any], Any], target: Any, barrier: Any) -> None:
    """Copies rows of head_dim elements, one part of their width at a time."""
    for part in range(launch.parts):
        columns = pl.ds(part * launch.part_width, launch.part_width)
        plgpu.copy_gmem_to_smem(source(columns), target.at[part], barrier)
