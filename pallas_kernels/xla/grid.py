"""What the forward and the backward pass share: arrays regrouped for loops over heads, products, padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.device import target
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE, num_key_tiles, num_query_tiles
from pallas_kernels.xla.visits import STEP


@dataclasses.dataclass(frozen=True)
class Grid:
    """Arrays regrouped for the loops: `p` pairs of (sequence, KV head) at once, outer loop over the rest (`o`)."""

    batch: int
    kv_heads: int
    at_once: int

    @staticmethod
    def of(q: Array, k: Array) -> Grid:
        pairs = q.shape[0] * k.shape[2]
        # A CPU runs one group's matrix products at full rate, and a loop over groups lets each stop at its own
        # count; an accelerator needs all heads at once to fill the chip.
        return Grid(q.shape[0], k.shape[2], 1 if on_cpu() else pairs)

    def queries(self, x: Array, rows: int) -> Array:
        """[b, t, n, ...] -> [o, p, g, rows, ...], zero-padded from t to `rows`."""
        x = jnp.pad(x, [(0, 0), (0, rows - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(self.batch, rows, self.kv_heads, -1, *x.shape[3:])
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(-1, self.at_once, *x.shape[2:])

    def rows(self, x: Array, t: int) -> Array:
        """The inverse of `queries`."""
        x = x.reshape(self.batch, self.kv_heads, *x.shape[2:])
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(self.batch, x.shape[1], -1, *x.shape[4:])[:, :t]

    def keys(self, x: Array, rows: int) -> Array:
        """[b, s, k, h] -> [o, p, rows, h], zero-padded from s to `rows`."""
        x = jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
        return x.reshape(-1, self.at_once, *x.shape[2:])

    def positions(self, x: Array, s: int) -> Array:
        """The inverse of `keys`."""
        return x.reshape(self.batch, self.kv_heads, *x.shape[2:]).swapaxes(1, 2)[:, :s]

    def per_head(self, tree: Any) -> Any:
        """Leaves [b, n, ...] -> [o, p, g, ...]."""
        return jax.tree.map(lambda x: x.reshape(-1, self.at_once, x.shape[1] // self.kv_heads, *x.shape[2:]), tree)

    def per_sequence(self, x: Array) -> Array:
        """[b] -> [o, p]."""
        return jnp.repeat(x, self.kv_heads).reshape(-1, self.at_once)


def gather(x: Float[Array, "p s h"], positions: Int[Array, "p g w"]) -> Float[Array, "p g w h"]:
    """Rows at positions; out of range ones are clipped (their weight is zero)."""
    return jax.vmap(lambda rows, index: rows.at[index].get(mode="clip"))(x, positions)


def on_cpu() -> bool:
    """Whether programs are made for a CPU."""
    return target().platform == "cpu"


def scores_of(q: Float[Array, "p g t h"], keys: Array, scale: float) -> Float[Array, "p g t w"]:
    """Products of queries and keys [p, g, w, h], or of keys [p, w, h] that a group's heads share."""
    product = "pgth,psh->pgts" if keys.ndim == 3 else "pgth,pgsh->pgts"
    return jnp.einsum(product, q, keys, preferred_element_type=jnp.float32) * scale


def weighted_sum(weights: Float[Array, "p g t w"], values: Array) -> Float[Array, "p g t h"]:
    """Sums of values, which have either form of `scores_of`."""
    product = "pgts,psh->pgth" if values.ndim == 3 else "pgts,pgsh->pgth"
    return jnp.einsum(product, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


def diagonal_tiles(k, v, q0):
    """Keys, values and causal mask [128, 128] of the diagonal tiles."""
    row = jnp.arange(QUERY_TILE, dtype=jnp.int32)
    keys, values = (lax.dynamic_slice_in_dim(x, q0, QUERY_TILE, axis=1) for x in (k, v))
    return keys, values, row[None, :] <= row[:, None]


def without_padding(
    x: Float[Array, "b s k h"], limit: Int[Array, " b"], first: int | Int[Array, ""] = 0
) -> Float[Array, "b s k h"]:
    """Zeros past each sequence's length, for rows that begin at position `first`: a weight of 0 would not silence a NaN
    that the padding holds."""
    inside = first + jnp.arange(x.shape[1], dtype=jnp.int32) < limit[:, None]
    return jnp.where(inside[:, :, None, None], x, jnp.zeros((), x.dtype))


def only_visible(x: Array, visible: Bool[Array, "p g w"]) -> Array:
    """Zeros at a step's keys that do not count: such a key may lie in the future and hold a NaN."""
    visible = visible[:, 0] if x.ndim == 3 else visible  # dense steps are shared by the heads of a group
    return jnp.where(visible[..., None], x, jnp.zeros((), x.dtype))


def only_finite(x: Array) -> Array:
    """Zeros for NaN and infinities."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def padded_lengths(q: Array, k: Array) -> tuple[int, int]:
    """Rows of queries and of keys that the loops want."""
    rows = num_query_tiles(q.shape[1]) * QUERY_TILE
    # Room for a diagonal that starts in the last key tile, and for a dense step that ends past it.
    return rows, num_key_tiles(k.shape[1]) * KEY_TILE + STEP
