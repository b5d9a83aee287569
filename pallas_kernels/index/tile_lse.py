"""What every 64-key tile holds of the softmax of some rows, in one pass over the keys (Mosaic GPU, Hopper).

For row r and key tile j the base-2 logarithm of the tile's terms,

    c[r, j] = log2 sum_{keys x of tile j, x <= position of r} 2^(scale * log2(e) * q_r . k_x)

and the same of each chunk of keys, by which the rows are normalised. Rows and keys have 16 bits, or 8 with factors that
make of their products what they stand for.

No tile depends on another, so thread blocks share nothing: each takes 128 rows of one KV head and a chunk of keys.
Keys come 128 at a time by TMA. Each of two compute warpgroups has 64 rows; its products of one step run beside the
exponentials of the step before. Four steps give 8 key tiles: 32 bytes of each row, which are written from registers at
once.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import axes
from pallas_kernels.device import DEFAULT_MULTIPROCESSORS
from pallas_kernels.hopper.product import start_scores
from pallas_kernels.index.terms import TILES, exponentials, hidden_after, tile_parts, tile_sums
from pallas_kernels.sizes import KEY_TILE
from pallas_kernels.tracing import without_axes

HEAD_DIMS = (64, 96, 128, 256)

WARPGROUPS, ROWS = 2, 64
BLOCK = WARPGROUPS * ROWS
"""Rows of a thread block."""

STEP, STEPS = 2 * KEY_TILE, TILES // 2
"""Keys of a step, and steps of a group."""

GROUP = STEPS * STEP
"""Keys of a group."""

_SCORES = (ROWS, STEP)
_LAYOUT = plgpu.Layout.WGMMA
_LOWEST = -1e8
"""Stands for the score of a key that its row does not see: finite, so that no difference is NaN."""
_ABOVE, _MOST = 64.0, 128.0
"""Terms are relative to 2**64 times the largest tile before them. float32 holds sums below 2**128 of that, and terms
down to 2**-62 of the largest tile: a tile may exceed all before it by 192 octaves, a factor of e**133."""


@dataclasses.dataclass(frozen=True)
class MassConfig:
    """Static tuning of the kernel.

    - `chunk`: most keys of one thread block, a multiple of 512.
    - `polynomial_tiles`: how many of 16 exponentials are polynomials, which run beside the special function units. In
      FP8 the kernel took 2.07 ms with none, 1.72 with 1, 1.69 to 1.73 with 2 to 4; in 16 bits 2.2 to 2.35 with 1 to 4,
      by the order in which they ran (an H200, 128K tokens, head_dim 128, commit b8bc641).

    Raises ValueError for values that no kernel can be built from.
    """

    chunk: int
    polynomial_tiles: int = 2

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.chunk % GROUP:
            raise ValueError(f"chunk must be a positive multiple of {GROUP}; got {self.chunk}")
        if not 0 <= self.polynomial_tiles <= 16:
            raise ValueError(f"polynomial_tiles must be in [0, 16]; got {self.polynomial_tiles}")

    @classmethod
    def of(cls, kv_heads: int, rows: int, keys: int) -> MassConfig:
        """As few chunks as keep all multiprocessors busy: each begins with a wait for its queries and first keys.

        **Arguments:** `kv_heads` of all sequences, probe `rows` of each, and `keys`.
        """
        blocks = kv_heads * -(-rows // BLOCK)
        chunks = max(1, round(2 * DEFAULT_MULTIPROCESSORS / blocks))
        groups = -(-keys // GROUP)
        return cls(GROUP * max(min(groups, 4), -(-groups // chunks)))


class Factors(NamedTuple):
    """What makes products of rounded probes and keys what they are of exact ones: product · rows · keys + shift."""

    rows: Float[Array, "b k r"]
    keys: Float[Array, "b k g"]
    """Of each group of `GROUP` keys."""
    shift: Float[Array, "b k g r"]


def tile_lse(
    probes: Float[Array, "b k r h"],
    k: Float[Array, "b s k h"],
    positions: Int[Array, "b r"],
    *,
    scale: float,
    config: MassConfig,
    factors: Factors | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "b k R W"], Float[Array, "b k c R"]]:
    """log2 of the sum of each key tile's terms, and of each chunk's; R and W are r and s / 64 rounded up to multiples
    of 128 and 8.

    Undefined for rows at position -1, and for tiles and chunks that begin after a row's position.

    **Arguments:** `positions`: the last key that each row sees, less than s, in any order, -1 for a row that is none;
    rows close to each other in positions save work. `factors`: of probes and keys that are rounded.
    """
    b, kv_heads, r, h = probes.shape
    s = k.shape[1]
    probes = jnp.pad(probes, ((0, 0), (0, 0), (0, -r % BLOCK), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, -r % BLOCK)), constant_values=-1)
    k = jnp.pad(k, ((0, 0), (0, -s % 8), (0, 0), (0, 0)))  # the row tiling of swizzled copies
    blocks, groups = positions.shape[1] // BLOCK, -(-s // GROUP)
    per_chunk = min(config.chunk // GROUP, groups)
    chunks = -(-groups // per_chunk)

    at = positions.reshape(b, blocks, BLOCK)
    # The last key that any of a block's rows sees, and the last that each of them does.
    last, common = at.max(-1), jnp.min(jnp.where(at < 0, s, at), axis=-1)

    size = k.dtype.itemsize
    swizzle = next(width for width in (128, 64, 32) if h * size % width == 0)
    tiling = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
    wide = h * size > 256
    stages = STEPS // 2 if wide else STEPS
    scaled = [] if factors is None else _padded(factors, positions.shape[1])
    emulate = interpret is not None
    log2_scale = scale * math.log2(math.e)

    def body(q_ref, k_ref, position_ref, last_ref, common_ref, *refs, q_smem, k_smem, q_full, k_full, k_free):
        *scaled_refs, tiles_ref, chunks_ref = refs
        z, chunk = lax.axis_index(axes.HEAD), lax.axis_index(axes.CHUNK)
        block = blocks - 1 - lax.axis_index(axes.ROWS)  # those with the most keys first
        batch, head = lax.div(z, jnp.int32(kv_heads)), lax.rem(z, jnp.int32(kv_heads))
        first = chunk * per_chunk
        some = lax.div(last_ref[batch, block] + GROUP, jnp.int32(GROUP))
        whole = jnp.minimum(lax.div(common_ref[batch, block] + 1, jnp.int32(GROUP)), some)
        some, whole = (jnp.clip(x - first, 0, per_chunk) for x in (some, whole))
        warpgroup = lax.axis_index(axes.WARPGROUP)

        def load():
            for w in range(WARPGROUPS):
                rows = pl.ds(block * BLOCK + w * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_ref.at[batch, head, rows], q_smem.at[w], q_full)

            def load_group(group, _):
                for u in range(STEPS):
                    slot = u % stages
                    if u < stages:
                        pl.when(group > 0)(lambda slot=slot: plgpu.barrier_wait(k_free.at[slot]))
                    else:
                        plgpu.barrier_wait(k_free.at[slot])
                    keys = pl.ds(((first + group) * STEPS + u) * STEP, STEP)
                    plgpu.copy_gmem_to_smem(k_ref.at[batch, keys, head], k_smem.at[slot], k_full.at[slot])

            lax.fori_loop(jnp.int32(0), some, load_group, None)
            for slot in range(stages):  # leave no arrival behind
                plgpu.barrier_wait(k_free.at[slot])

        def compute():
            rows = pl.ds(block * BLOCK + warpgroup * ROWS, ROWS)
            row_layout = _LAYOUT.reduce(1)
            position = plgpu.load(position_ref.at[batch, rows], layout=row_layout, optimized=False)
            row_factor = None
            if scaled_refs:
                row_factor = plgpu.load(scaled_refs[0].at[batch, head, rows], layout=row_layout, optimized=False)
                row_factor *= log2_scale
            nothing = plgpu.layout_cast(jnp.zeros((ROWS, TILES), jnp.float32), _LAYOUT)
            no_total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout)
            queries, last_position = q_smem.at[warpgroup], last_ref[batch, block]

            def of_columns(x, shape):
                return lax.broadcast_in_dim(x, shape, [0])

            def multiply(step, beside, ahead, group):
                """(scores of a step's keys, what `beside` returns); then those of the step `ahead` have arrived."""
                slot = step % stages
                # No group comes near 2**30, so nothing is added. But addresses that are the same in every group are
                # kept from one to the next, and there are more of them, one a product, than registers.
                keys = k_smem.at[slot + lax.shift_right_logical(group, jnp.int32(30))]
                if wide and not emulate:  # these products take too many registers for anything beside them
                    before = lax.optimization_barrier(beside())
                    beside = lambda: before  # noqa: E731

                def arrived():
                    if ahead is not None:
                        plgpu.barrier_wait(k_full.at[ahead % stages])

                if emulate:
                    result = jnp.dot(queries[...], keys[...].T, preferred_element_type=jnp.float32)
                    other = beside()
                    arrived()
                    plgpu.commit_smem()
                else:
                    result = start_scores(queries, keys, tiling, swizzle)
                    other = lax.optimization_barrier(beside())
                    arrived()
                    plgpu.wgmma_wait(0)
                    result = lax.optimization_barrier(result)
                plgpu.barrier_arrive(k_free.at[slot])
                return result, other

            def seen(s):
                return hidden_after(s, position - first * GROUP, _LOWEST, emulate=emulate)

            def of_group(group):
                """By what to multiply the products of each row, and what to add to that; () where that is the scale."""
                if not scaled_refs:
                    return ()
                _, keys_ref, shift_ref = scaled_refs
                shift = plgpu.load(shift_ref.at[batch, head, first + group, rows], layout=row_layout, optimized=False)
                return row_factor * keys_ref[batch, head, first + group], shift * log2_scale

            def parts(s, top, factor, group, u, masked):
                """What each thread has of the two tiles of step `u`, or zero if no row sees them.

                The branch also keeps the compiler from moving exponentials out of the products' way, before or after.
                """
                key = (first + group) * GROUP + u * STEP

                def terms():
                    last = position - key if masked else None
                    p = exponentials(s, factor, top, config.polynomial_tiles, last, emulate=emulate)
                    return tile_parts(p, emulate=emulate)

                return lax.cond(key <= last_position, terms, lambda: nothing)

            def run(group, carry, masked, last=False):
                """The tiles of a group, whose first scores come in the carry; so go out those of the next group.

                Terms are relative to `top`, `_ABOVE` the largest logarithm of a tile so far. With a maximum of each
                tile the kernel took 2.50 ms instead of 2.31 (an H200, 128K tokens, a probe in 64 rows, commit 4ee996a).
                Should a tile's exceed it by 128 or more, it counts as 128 more.
                """
                s, top, total, this = carry
                following = this if last else of_group(jnp.minimum(group + 1, some - 1))  # arrives on the way
                factor, below = (this[0], top - this[1]) if this else (log2_scale, top)
                found = []
                for u in range(STEPS):

                    def of_step(s=s, u=u):
                        return parts(s, below, factor, group, u, masked)

                    if last and u == STEPS - 1:
                        found.append(of_step())
                        continue
                    ahead = None if last and u == STEPS - 2 else u + 2
                    s, part = multiply(u + 1, of_step, ahead, group)
                    found.append(part)
                c = tile_sums(found, emulate=emulate)
                c = of_columns(top, c.shape) + jnp.minimum(jnp.log2(c), _MOST)
                _store(tiles_ref.at[batch, head, rows, pl.ds((first + group) * TILES, TILES)], c)
                higher = jnp.maximum(top, c.max(axis=1) + _ABOVE)
                total = total * jnp.exp2(top - higher) + jnp.exp2(c - of_columns(higher, c.shape)).sum(axis=1)
                return s, higher, total, following

            plgpu.barrier_wait(q_full)
            plgpu.barrier_wait(k_full.at[0])
            s, _ = multiply(0, lambda: jnp.int32(0), 1, jnp.int32(0))
            before = jnp.minimum(whole, some - 1)
            this = of_group(jnp.int32(0))
            highest = lax.cond(before > 0, lambda: s.max(axis=1), lambda: seen(s).max(axis=1))  # of the first keys
            highest = highest * this[0] + this[1] if this else highest * log2_scale
            carry = s, highest + _ABOVE, no_total, this
            carry = lax.fori_loop(jnp.int32(0), before, lambda group, x: run(group, x, masked=False), carry)
            carry = lax.fori_loop(before, some - 1, lambda group, x: run(group, x, masked=True), carry)
            _, top, total, _ = run(some - 1, carry, masked=True, last=True)
            _store(chunks_ref.at[batch, head, chunk, rows], top + jnp.log2(total))

        @pl.when((some > 0) & (warpgroup == WARPGROUPS))
        def _():
            plgpu.set_max_registers(40, action="decrease")
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(load))

        @pl.when((some > 0) & (warpgroup < WARPGROUPS))
        def _():
            plgpu.set_max_registers(232, action="increase")
            compute()

    rows = blocks * BLOCK
    tiles, of_chunks = without_axes(
        plgpu.kernel(
            body,
            out_type=[
                jax.ShapeDtypeStruct((b, kv_heads, rows, groups * TILES), jnp.float32),
                jax.ShapeDtypeStruct((b, kv_heads, chunks, rows), jnp.float32),
            ],
            scratch_types={
                "q_smem": plgpu.SMEM((WARPGROUPS, ROWS, h), k.dtype, transforms=tiling),
                "k_smem": plgpu.SMEM((stages, STEP, h), k.dtype, transforms=tiling),
                "q_full": plgpu.Barrier(num_arrivals=WARPGROUPS),
                "k_full": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
                "k_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            },
            grid=(blocks, b * kv_heads, chunks),
            grid_names=(axes.ROWS, axes.HEAD, axes.CHUNK),
            num_threads=WARPGROUPS + 1,
            thread_name=axes.WARPGROUP,
            interpret=interpret,
            kernel_name="tile_lse",
            compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        )
    )(probes, k, positions, last, common, *scaled)
    return tiles, of_chunks


def _store(place: Any, value: Array) -> None:
    """Writes from registers to device memory. Since jax 0.12 less than a cache line at a time has to be asked for."""
    store = getattr(plgpu, "store", None)
    if store is None:
        place[...] = value
    else:
        store(place, value, optimized=False)


def _padded(factors: Factors, rows: int) -> list[Array]:
    """The factors for as many rows as the thread blocks have."""
    more = (0, rows - factors.rows.shape[-1])
    of_rows = jnp.pad(factors.rows, ((0, 0), (0, 0), more))
    return [of_rows, factors.keys, jnp.pad(factors.shift, ((0, 0), (0, 0), (0, 0), more))]
