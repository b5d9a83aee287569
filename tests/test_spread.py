"""Arrays that are spread over devices: nothing is gathered, results lie where the queries lie, and are the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_qkv
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from minference_jax import AShape, SharedDensity, make_plan, sparse_attention
from pallas_kernels.spread import KV_AXES, PER_SEQUENCE, Q_AXES, WHOLE, by_device

KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
HEADS, BATCH = PartitionSpec(None, None, "x"), PartitionSpec("x")
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def spread(kind, specs, *arrays):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


def compiled(function, *arguments):
    """The program, and how many arrays it gathers."""
    program = jax.jit(function).lower(*arguments).compile()
    return program, len(re.findall(r"\sall-gather(?:-start)?\(", program.as_text()))


@pytest.mark.parametrize("spec", [HEADS, BATCH], ids=["heads", "batch"])
@kinds
def test_sparse_attention_gathers_nothing_and_leaves_its_output_where_q_is(rng, kind, spec):
    arrays = random_qkv(rng, 2, 200, 200, 2, 2, 8)
    attend = functools.partial(sparse_attention, pattern=AShape(2, 65))
    program, gathers = compiled(attend, *(given := spread(kind, [spec] * 3, *arrays)))
    assert gathers == 0
    assert program.output_shardings.is_equivalent_to(given[0].sharding, 4)
    np.testing.assert_array_equal(program(*given), jax.jit(attend)(*arrays))


def test_heads_on_several_devices_share_one_density(rng):
    """Ties are broken by the number of the head, which needs a count from the devices before."""
    q, k, _ = arrays = random_qkv(rng, 1, 256, 256, 4, 2, 8)
    plan = jax.jit(functools.partial(make_plan, pattern=SharedDensity(0.7, every=64)))
    found = plan(*spread(AxisType.Auto, [HEADS] * 3, *arrays)[:2])
    jax.tree.map(np.testing.assert_array_equal, found, plan(q, k))


def weighted(q, k, v, lengths, shift, *, axis_name, power):
    """A stand-in for attention: loops over heads, sums over each sequence, and says which axes divide its heads."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.moveaxis(jnp.repeat(x, group, axis=2), 2, 0) for x in (k, v))
    out = jax.lax.map(lambda x: jnp.einsum("bth,bsh,bsd->btd", *x), (jnp.moveaxis(q, 2, 0), k, v))
    count = jnp.float32(1 if axis_name is None else jax.lax.axis_size(axis_name))
    out = jnp.moveaxis(out, 0, 2) ** power + (lengths.astype(q.dtype) + shift)[:, None, None, None]
    return out, jnp.full(q.shape[:3], count)


def divided(q, k, v, lengths):
    axes = (Q_AXES, KV_AXES, KV_AXES, PER_SEQUENCE, WHOLE)
    arrays = (q, k, v, lengths, jnp.float32(1))
    return by_device(weighted, arrays, axes, (Q_AXES, Q_AXES), axis_name=None, power=2)


WHERE = {
    "heads of both": (2, HEADS, HEADS),
    "one KV head for all": (1, HEADS, PartitionSpec()),
    "positions, which are gathered": (2, PartitionSpec(None, "x"), PartitionSpec(None, "x")),
}


@pytest.mark.parametrize("kv_heads, of_q, of_k", WHERE.values(), ids=WHERE)
@kinds
def test_results_gradients_and_vmap_are_those_of_one_device(rng, kind, kv_heads, of_q, of_k):
    arrays = random_qkv(rng, 2, 6, 6, 4, kv_heads, 8)
    given = spread(kind, (of_q, of_k, of_k), *arrays)
    lengths = jnp.array([1, 2], jnp.int32)

    def both(q, k, v):
        out, devices = divided(q, k, v, lengths)
        return out, jax.grad(lambda *x: divided(*x, lengths)[0].sum(), (0, 1, 2))(q, k, v), devices

    program, gathers = compiled(both, *given)
    (*found, devices), (*expected, _) = program(*given), jax.jit(both)(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3), found, expected)
    assert (gathers == 0) == (of_q != PartitionSpec(None, "x"))
    assert float(devices.max()) == (2 if of_q == HEADS else 1)
    if kv_heads == 1:
        return
    mapped = jax.jit(jax.vmap(lambda q: divided(q, given[1], given[2], lengths)[0]))
    np.testing.assert_allclose(mapped(jnp.stack([given[0]] * 2))[1], expected[0], rtol=1e-5, atol=1e-3)


def test_a_call_in_someone_elses_shard_map_is_left_alone(rng):
    arrays = random_qkv(rng, 2, 6, 6, 4, 2, 8)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        lambda q, k, v: divided(q, k, v, jnp.zeros(2, jnp.int32)), mesh=mesh, in_specs=HEADS, out_specs=HEADS
    )
    out, devices = jax.jit(run)(*arrays)
    np.testing.assert_allclose(out, divided(*arrays, jnp.zeros(2, jnp.int32))[0], rtol=1e-5, atol=1e-3)
    assert float(devices.max()) == 1
