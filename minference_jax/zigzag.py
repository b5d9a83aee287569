"""Which query tiles of a head each of several devices attends for.

Causal rows cost more the later they stand. Of 2P chunks of a prompt device r takes r and 2P − 1 − r, one early and one
late, so that all have the same number of cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels.plan import QUERY_TILE, SparsePlan


@dataclass(frozen=True)
class Zigzag:
    """Rows dealt to the `devices` along a mesh axis, inside `jax.shard_map`. Hashable.

    `multiple`: chunks are so many rows, or a multiple of them; itself a multiple of 128.
    """

    axis_name: str
    devices: int
    multiple: int = QUERY_TILE

    def chunk(self, t: int) -> int:
        """Rows of a chunk of a prompt of t rows; the last chunks may be partly or wholly past its end."""
        return -(-t // (2 * self.devices * self.multiple)) * self.multiple

    def padded(self, t: int) -> int:
        """Rows of all chunks."""
        return 2 * self.devices * self.chunk(t)

    def _order(self) -> np.ndarray:
        first = np.arange(self.devices)
        return np.stack([first, 2 * self.devices - 1 - first], axis=1).reshape(-1)

    def dealt(self, x: Array, axis: int) -> Array:
        """`padded` rows in the order of devices: those of device 0, of device 1, …"""
        return jnp.concatenate([self._chunks(x, axis)[i] for i in self._order()], axis=axis)

    def back(self, x: Array, axis: int, t: int) -> Array:
        """From the order of devices to that of the prompt, cut to its t rows."""
        x = jnp.concatenate([self._chunks(x, axis)[i] for i in np.argsort(self._order())], axis=axis)
        return jax.lax.slice_in_dim(x, 0, t, axis=axis)

    def _chunks(self, x: Array, axis: int) -> list[Array]:
        return jnp.split(x, 2 * self.devices, axis=axis)

    def _starts(self, t: int) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
        place = jax.lax.axis_index(self.axis_name)
        return place * self.chunk(t), (2 * self.devices - 1 - place) * self.chunk(t)

    def own(self, x: Array) -> Array:
        """This device's rows of an array `[b, t, …]`, its two chunks one after the other."""
        t = x.shape[1]
        x = _padded(x, self.padded(t), 1)
        return jnp.concatenate(
            [jax.lax.dynamic_slice_in_dim(x, start, self.chunk(t), axis=1) for start in self._starts(t)], axis=1
        )

    def attend(
        self,
        attention: Callable[..., Any],
        q: Array,
        k: Array,
        v: Array,
        plan: SparsePlan | None,
        q_offset: Int32[Array, ""] | int,
    ) -> Any:
        """`attention(q, k, v, plan, q_offset)`, an array or several, of this device's two chunks of q."""
        t, size = q.shape[1], self.chunk(q.shape[1])
        extra = self.padded(t) - t
        # Queries past the end need keys at their place.
        q, k, v = (_padded(x, x.shape[1] + extra, 1) for x in (q, k, v))
        tiles = self.padded(t) // QUERY_TILE
        outs = []
        for start in self._starts(t):
            rows = jax.lax.dynamic_slice_in_dim(q, start, size, axis=1)
            part = None if plan is None else _tiles(plan, start // QUERY_TILE, size // QUERY_TILE, tiles)
            outs.append(attention(rows, k, v, part, q_offset + start))
        return jax.tree.map(lambda *chunks: jnp.concatenate(chunks, axis=1), *outs)


def _padded(x: Array, size: int, axis: int) -> Array:
    return jnp.pad(x, [(0, size - x.shape[i] if i == axis else 0) for i in range(x.ndim)])


def _tiles(plan: SparsePlan, first: Array, number: int, of: int) -> SparsePlan:
    """The plan of some of its query tiles."""
    if plan.blocks is None or plan.block_count is None:
        return plan
    blocks, count = (
        jax.lax.dynamic_slice_in_dim(_padded(x, of, 2), first, number, axis=2) for x in (plan.blocks, plan.block_count)
    )
    return replace(plan, blocks=blocks, block_count=count)
