"""Random plans for tests: unsorted trouble included (entries out of range, repeats, counts below the width)."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import SparsePlan
from pallas_kernels.plan import num_query_tiles


def int32(values) -> jnp.ndarray:
    return jnp.asarray(np.asarray(values, np.int32))


def random_plan(rng, b, n, t, s, *, columns=20, bands=4, blocks=3) -> SparsePlan:
    """A plan with all three parts, overlapping, and with entries that must be ignored.

    The first head of each sequence has no blocks and bands at any distance; in the others most bands are multiples of
    64 and some break that rule.
    """
    tiles = s // 64 + 1
    shape = (b, n, num_query_tiles(t))
    free = np.broadcast_to(np.arange(n)[:, None] == 0, (b, n, bands))
    unaligned = free | (rng.random((b, n, bands)) < 0.2)
    distances = rng.integers(-2, tiles + 2, (b, n, bands)) * 64 + np.where(
        unaligned, rng.integers(0, 64, free.shape), 0
    )
    block_count = rng.integers(0, blocks + 1, shape)
    block_count[:, 0] = 0
    return SparsePlan(
        int32(np.sort(rng.integers(-5, s + 20, (b, n, columns)), -1)),
        int32(rng.integers(0, columns + 1, (b, n))),
        int32(np.sort(distances, -1)),
        int32(rng.integers(0, bands + 1, (b, n))),
        int32(np.sort(rng.integers(-1, tiles + 2, (*shape, blocks)), -1)),
        int32(block_count),
    )
