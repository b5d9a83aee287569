"""The block-sparse index against the plain NumPy statement of its rule."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_index

from minference_jax.attention import make_plan
from minference_jax.index import block_sparse
from minference_jax.patterns import BlockSparse

PLAN = jax.jit(make_plan, static_argnames=("pattern",))


def check(plan, scores, budget, row, head, offset):
    for i, expected in enumerate(numpy_index.block_tiles(scores, budget, offset)):
        count = int(plan.block_count[row, head, i])
        np.testing.assert_array_equal(plan.blocks[row, head, i, :count], expected)


def test_tiles_equal_the_rule_on_odd_lengths_and_offsets(rng):
    b, t, n, kv, h = 6, 700, 4, 2, 16
    for offset, budget in ((0, 5), (512, 9)):
        s = offset + t
        q = rng.standard_normal((b, t, n, h)).astype(np.float32)
        k = rng.standard_normal((b, s, kv, h)).astype(np.float32)
        lengths = rng.integers(offset + 1, s + 1, b).astype(np.int32)
        plan = PLAN(jnp.asarray(q), jnp.asarray(k), BlockSparse(budget), lengths=jnp.asarray(lengths), q_offset=offset)
        for row in range(b):
            for head in range(n):
                scores = numpy_index.block_scores(q[row, :, head], k[row, :, head // 2], lengths[row], offset)
                check(plan, scores, budget, row, head, offset)


def test_padding_stays_out_of_the_means(rng):
    x = rng.standard_normal((2, 150, 3, 8)).astype(np.float32)
    valid = np.array([150, 70], np.int32)
    pooled = block_sparse.pool(jnp.asarray(x), 64, jnp.asarray(valid))
    for row in range(2):
        for head in range(3):
            expected = numpy_index.pooled(x[row, :, head], 64, valid[row])
            np.testing.assert_allclose(pooled[row, :, head], expected, atol=1e-6)


def test_a_selection_by_hand():
    scores = jnp.asarray([[-5.0, 3.0, jnp.nan, 3.0, 2.0, 9.0]], jnp.float32)
    select = jax.jit(block_sparse.select_tiles, static_argnums=3)
    tiles, count = select(scores, jnp.asarray([3]), jnp.asarray([5]), 3)
    # Tile 5 is not before the diagonal; tile 0 is forced; NaN is never chosen.
    np.testing.assert_array_equal(tiles, [[0, 1, 3]])
    np.testing.assert_array_equal(count, [3])
