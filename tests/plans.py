"""Random plans for tests: unsorted trouble included (entries out of range, repeats, counts below the width)."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import SparsePlan
from pallas_kernels.plan import num_query_tiles


def int32(values) -> jnp.ndarray:
    return jnp.asarray(np.asarray(values, np.int32))


def random_plan(rng, b, n, t, s, *, columns=20, bands=4, blocks=3) -> SparsePlan:
    """A plan with all three parts, overlapping, and with entries that must be ignored."""
    tiles = s // 64 + 1
    shape = (b, n, num_query_tiles(t))
    return SparsePlan(
        int32(np.sort(rng.integers(-5, s + 20, (b, n, columns)), -1)),
        int32(rng.integers(0, columns + 1, (b, n))),
        int32(np.sort(rng.integers(-2, tiles + 2, (b, n, bands)) * 64, -1)),
        int32(rng.integers(0, bands + 1, (b, n))),
        int32(np.sort(rng.integers(-1, tiles + 2, (*shape, blocks)), -1)),
        int32(rng.integers(0, blocks + 1, shape)),
    )
