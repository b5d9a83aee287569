"""The mass kernel's logarithms as attention masses: normalised by row, added up by query tile, and made into keys.

The logarithms are the largest array of an index: four bytes for each probe, head and key tile. A thread block has the
probes of one query tile and head, and reads of each what it sees: half of the array, once. A compiler's kernel reads
all of it, and takes launches of its own for the rows' totals.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.index.tile_keys import TileRule, tile_key
from pallas_kernels.sizes import KEY_TILE, num_key_tiles
from pallas_kernels.tracing import without_axes

WARPS, AT_ONCE = 4, 4_096
"""Of a thread block, and how many logarithms it holds at once."""

_TOGETHER = 4
"""Logarithms that a thread loads at once: 16 bytes."""


def normalised(
    tiles: Float[Array, "b k R W"],
    chunks: Float[Array, "b k c R"],
    positions: Int[Array, "b r"],
    share: Float[Array, "b i p"],
    rule: TileRule | None,
    *,
    heads: int,
    keys: int,
    chunk: int,
    interpret: bool = False,
) -> list[Array]:
    """Masses and log-sum-exps from the two results of `tile_lse`, of which only what a row sees is defined; or keys.

    **Arguments:** `positions`: as there; `share`: how many rows each probe stands for; `rule`: None for masses; `chunk`
    (static): keys of a chunk. `interpret` (static): run the kernel on a CPU, for tests.

    **Returns:** masses float32 `[b, n, i, j]` and log-sum-exps float32 `[b, n, i, p]`; with a rule the uint16 keys of
    `[b, n, i, j]` alone.
    """
    b, kv_heads, _, width = tiles.shape
    query_tiles, per_tile = share.shape[1:]
    group, key_tiles = heads // kv_heads, num_key_tiles(keys)
    probes = pl.next_power_of_2(per_tile)
    some = min(pl.next_power_of_2(key_tiles), max(AT_ONCE // probes, _TOGETHER))

    def kernel(tiles_ref, chunks_ref, positions_ref, share_ref, *refs):
        result_ref = refs[-1] if rule is not None else refs[0]
        i, head, batch = query_tiles - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
        kv_head, member = jax.lax.div(head, group), jax.lax.rem(head, group)
        p = jnp.arange(probes, dtype=jnp.int32)
        there = p < per_tile
        row = (i * group + member) * per_tile + p
        last = plgpu.load(positions_ref.at[batch, row], mask=there, other=-1)
        factor = jnp.where(last >= 0, plgpu.load(share_ref.at[batch, i, p], mask=there, other=0), 0)

        def add(c: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            top, total = sums
            found = plgpu.load(chunks_ref.at[batch, kv_head, c, row], mask=c * chunk <= last, other=-jnp.inf)
            higher = jnp.maximum(top, found)
            return higher, total * jnp.exp2(top - higher) + jnp.exp2(found - higher)

        start = jnp.full((probes,), -1e38, jnp.float32), jnp.zeros((probes,), jnp.float32)
        top, total = jax.lax.fori_loop(0, chunks.shape[2], add, start)
        level = jnp.where(last >= 0, top + jnp.log2(total), 0)
        of_rule = None
        if rule is None:
            lse = jnp.where(last >= 0, math.log(2) * level, -jnp.inf)
            plgpu.store(refs[1].at[batch, head, i, p], lse, mask=there)
        else:
            start_ref, rows_ref, end_ref, threshold_ref = refs[:-1]
            of_rule = start_ref[i], rows_ref[batch, i], end_ref[batch, i] > 0, threshold_ref[batch, head]

        def whole(x: Array, axis: int) -> Array:
            return jnp.broadcast_to(jnp.expand_dims(x, axis), (probes, some))

        def some_tiles(step: Any, _: None) -> None:
            j = step * some + jnp.arange(some, dtype=jnp.int32)
            # Loads are narrow where each element has a mask of its own; the width is a multiple of what is loaded.
            loaded = whole(jax.lax.div(j, _TOGETHER) * (_TOGETHER * KEY_TILE), 0) <= whole(last, 1)
            at = tiles_ref.at[batch, kv_head, whole(row, 1), whole(j, 0)]
            found = plgpu.load(at, mask=loaded, other=-jnp.inf)
            found = jnp.where(whole(KEY_TILE * j, 0) <= whole(last, 1), found, -jnp.inf)
            mass = (jnp.exp2(found - whole(level, 1)) * whole(factor, 1)).sum(0)
            found = mass if of_rule is None else tile_key(mass, j, *of_rule)
            plgpu.store(result_ref.at[batch, head, i, j], found, mask=j < key_tiles)

        jax.lax.fori_loop(0, pl.cdiv(key_tiles, some), some_tiles, None)

    shape = (b, heads, query_tiles, key_tiles)
    if rule is None:
        results = [jax.ShapeDtypeStruct(x, jnp.float32) for x in (shape, (*shape[:3], per_tile))]
    else:
        rule, results = rule._replace(end=rule.end.astype(jnp.int32)), [jax.ShapeDtypeStruct(shape, jnp.uint16)]
    assert width % _TOGETHER == 0
    return without_axes(
        pl.pallas_call(
            kernel,
            grid=(query_tiles, heads, b),
            out_shape=results,
            compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
            interpret=interpret,
            name="normalised",
        )
    )(tiles, chunks, positions, share, *(() if rule is None else rule))
