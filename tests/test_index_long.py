"""The index at 131,072 tokens: every planted column and slash is found, at any depth, by every rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.attention import make_plan
from minference_jax.patterns import VerticalSlash
from pallas_kernels.bands import band_bitmap, covered

TOKENS = 131_072
COLUMNS = (70, 6_001, 65_536, 120_000)  # past the last spread probe (128,992) a column would pass for a slash
SLASHES = (300, 4_097, 4_099, 4_160, 60_000, 120_001)  # three of them a cluster


@pytest.fixture(scope="module")
def planted():
    """q, k of two heads: one attends to all columns alike, in the other each row attends at one of the distances."""
    rng = np.random.default_rng(0)
    q, k = np.zeros((1, TOKENS, 2, 64), np.float32), np.zeros((1, TOKENS, 2, 64), np.float32)
    q[..., 0, :] = 2
    k[0, COLUMNS, 0] = 2
    codes = rng.choice([-1, 1], (TOKENS, 64)).astype(np.float32)
    k[0, :, 1] = codes
    row = np.arange(TOKENS)
    key = row - np.array(SLASHES)[row % len(SLASHES)]
    q[0, :, 1] = np.where(key[:, None] >= 0, 3 * codes[np.maximum(key, 0)], 0)
    return jnp.asarray(q, jnp.bfloat16), jnp.asarray(k, jnp.bfloat16)


@pytest.mark.parametrize(
    "pattern",
    [
        VerticalSlash(columns=40, slashes=150),
        VerticalSlash(columns=40, tiles=24, probes="spread"),
        VerticalSlash(columns=40, tiles=24, probes="spread", threshold=1e-4),
    ],
    ids=["lines", "spread", "threshold"],
)
def test_planted_columns_and_slashes_are_found(planted, pattern):
    plan = jax.jit(lambda q, k: make_plan(q, k, pattern))(*planted)
    columns = np.asarray(plan.columns[0, 0, : int(plan.column_count[0, 0])])
    assert set(COLUMNS) <= set(columns.tolist())
    bands = jnp.where(jnp.arange(plan.bands.shape[-1]) < plan.band_count[0, :, None], plan.bands[0], TOKENS)
    bitmap = band_bitmap(bands, TOKENS)
    for distance in SLASHES:
        # How far before its query tile's start a row of the tile finds the key at this distance.
        before = distance - np.arange(128)
        seen = np.asarray(covered(bitmap, jnp.broadcast_to(jnp.asarray(before, jnp.int32), (2, 128))))[1]
        assert np.mean(seen | (before <= 0)) > 0.95, distance
