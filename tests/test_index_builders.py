"""The other estimators, Antidiagonal and QueryAware: padded batches, vmap and shards of heads change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_qkv

from minference_jax.attention import make_plan
from minference_jax.patterns import Antidiagonal, QueryAware
from pallas_kernels.plan_check import lists_are_clean

PLAN = jax.jit(make_plan, static_argnames="pattern")
BUILDERS = [Antidiagonal(blocks=4, coverage=0.7), QueryAware(blocks=4, columns=20, tiles=2, divergence=0.25)]


def inputs(rng, b):
    """Two heads of weak and two of strong scores: of three sequences, `QueryAware` gives lines to the strong of one."""
    q, k, _ = random_qkv(rng, b, 448, 448, 4, 2, 16)
    return q * jnp.asarray([0.1, 9.0, 0.1, 9.0])[:, None], k


@pytest.mark.parametrize("pattern", BUILDERS, ids=lambda p: type(p).__name__)
def test_padded_batch_equals_each_sequence_alone_and_vmap(rng, pattern):
    q, k = inputs(rng, 3)
    lengths = jnp.asarray([448, 190, 64], jnp.int32)
    together = PLAN(q, k, pattern, lengths=lengths)
    assert together.clean and lists_are_clean(together).all()
    one = jax.jit(jax.vmap(lambda q, k, length: make_plan(q[None], k[None], pattern, lengths=length[None])))
    mapped = jax.tree.map(lambda x: x[:, 0], one(q, k, lengths))
    np.testing.assert_array_equal(mapped.to_mask(448, 448), together.to_mask(448, 448))
    alone = PLAN(q[1:2, :190], k[1:2, :190], pattern)
    expected = np.asarray(together.to_mask(448, 448))[1, :, :190, :190]
    np.testing.assert_array_equal(np.asarray(alone.to_mask(190, 190))[0], expected)


@pytest.mark.parametrize("pattern", BUILDERS, ids=lambda p: type(p).__name__)
def test_shard_map_over_heads(rng, pattern):
    q, k = inputs(rng, 1)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, out = (jax.sharding.PartitionSpec(*axes) for axes in ((None, None, "heads"), (None, "heads")))
    sharded = jax.shard_map(
        lambda q, k: make_plan(q, k, pattern), mesh=mesh, in_specs=(spec, spec), out_specs=out, check_vma=False
    )
    jax.tree.map(np.testing.assert_array_equal, PLAN(q, k, pattern), jax.jit(sharded)(q, k))
