"""Every implementation that runs on a CPU against the float32 oracle, and the public functions' contracts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_qkv
from jax.sharding import AxisType, PartitionSpec
from plans import int32, random_plan

from pallas_kernels import (
    SparsePlan,
    a_shape_attention,
    block_sparse_attention,
    dense_attention,
    sparse_attention,
    vertical_slash_attention,
)
from pallas_kernels.plan_builders import a_shape_plan, full_plan, vertical_slash_plan

# b, t, s, n, k, h, q_offset, lengths, dtype
CASES = [
    pytest.param(2, 300, 300, 4, 2, 64, 0, [300, 77], "float32", id="odd-length-gqa2-unequal"),
    pytest.param(1, 40, 40, 2, 2, 64, 0, None, "float32", id="shorter-than-a-tile-gqa1"),
    pytest.param(3, 200, 520, 4, 1, 96, 256, [456, 0, 300], "float32", id="q-shorter-than-kv-gqa4-padded-sequence-h96"),
    pytest.param(1, 130, 130, 8, 1, 128, 0, None, "float32", id="gqa8-h128"),
    pytest.param(2, 257, 513, 4, 4, 64, 256, None, "float32", id="one-row-past-a-tile"),
    pytest.param(1, 1, 1, 2, 1, 64, 0, None, "float32", id="one-token"),
    pytest.param(2, 256, 256, 4, 2, 64, 0, [0, 0], "float32", id="all-rows-padded"),
    pytest.param(2, 300, 300, 4, 2, 64, 0, [300, 130], "bfloat16", id="bfloat16"),
    pytest.param(2, 300, 300, 4, 2, 64, 0, [300, 130], "float16", id="float16"),
]
ARGUMENTS = "b, t, s, n, k, h, q_offset, lengths, dtype"


def both(q, k, v, plan, **arguments):
    run = jax.jit(
        lambda q, k, v, plan, implementation: sparse_attention(
            q, k, v, plan, implementation=implementation, return_lse=True, **arguments
        ),
        static_argnums=4,
    )
    return run(q, k, v, plan, "xla"), run(q, k, v, plan, "reference")


@pytest.mark.parametrize(ARGUMENTS, CASES)
def test_xla_equals_the_oracle(rng, b, t, s, n, k, h, q_offset, lengths, dtype):
    q, keys, values = random_qkv(rng, b, t, s, n, k, h, dtype)
    plan = random_plan(rng, b, n, t, s)
    lengths = None if lengths is None else int32(lengths)
    (out, lse), (expected, expected_lse) = both(q, keys, values, plan, lengths=lengths, q_offset=q_offset)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    assert_close(out, expected)
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(expected_lse))
    finite = np.isfinite(expected_lse)
    np.testing.assert_allclose(np.where(finite, lse, 0), np.where(finite, expected_lse, 0), atol=1e-3)
    if lengths is not None:
        padded = q_offset + np.arange(t) >= np.asarray(lengths)[:, None]
        assert (np.asarray(out, np.float32)[padded] == 0).all()


@pytest.mark.parametrize("part", ["columns", "bands", "blocks", "none"])
def test_each_part_alone(rng, part):
    q, k, v = random_qkv(rng, 1, 400, 400, 2, 1, 64)
    full = random_plan(rng, 1, 2, 400, 400)
    counts = {"columns": "column_count", "bands": "band_count", "blocks": "block_count"}
    plan = SparsePlan(**{name: getattr(full, name) for name in ((part, counts[part]) if part != "none" else ())})
    (out, _), (expected, _) = both(q, k, v, plan)
    assert_close(out, expected)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_plan_that_covers_everything_is_dense_attention(rng, implementation):
    q, k, v = random_qkv(rng, 2, 333, 333, 4, 2, 64)
    lengths = int32([333, 200])
    sparse = sparse_attention(q, k, v, full_plan(2, 4, 333), lengths=lengths, implementation=implementation)
    valid = np.arange(333) < np.asarray(lengths)[:, None]
    expected = jnp.where(valid[..., None, None], jax.nn.dot_product_attention(q, k, v, is_causal=True), 0.0)
    assert_close(sparse, expected)
    assert_close(dense_attention(q, k, v, lengths=lengths, implementation=implementation), expected)


def test_garbage_in_the_padding_does_not_leak(rng):
    q, k, v = random_qkv(rng, 1, 300, 300, 2, 1, 64)
    plan = random_plan(rng, 1, 2, 300, 300)
    clean = sparse_attention(q, k, v, plan, lengths=int32([200]), implementation="xla")
    q, k, v = (x.at[:, 200:].set(jnp.nan) for x in (q, k, v))
    np.testing.assert_array_equal(clean, sparse_attention(q, k, v, plan, lengths=int32([200]), implementation="xla"))


def test_a_sequence_of_a_batch_equals_the_sequence_alone(rng):
    q, k, v = random_qkv(rng, 3, 256, 256, 2, 1, 64)
    plan, lengths = random_plan(rng, 3, 2, 256, 256), int32([256, 100, 31])
    together = sparse_attention(q, k, v, plan, lengths=lengths, implementation="xla")
    for i in range(3):
        one = [x[i : i + 1] for x in (q, k, v)]
        alone = sparse_attention(*one, jax.tree.map(lambda x, i=i: x[i : i + 1], plan), lengths=lengths[i : i + 1])
        assert_close(together[i : i + 1], alone)


def test_chunks_equal_one_shot(rng):
    q, k, v = random_qkv(rng, 1, 512, 512, 2, 1, 64)
    plan = a_shape_plan(1, 2, sink=10, window=200)
    whole = sparse_attention(q, k, v, plan, implementation="xla")
    chunk = jax.jit(lambda q, offset: sparse_attention(q, k, v, plan, q_offset=offset, implementation="xla"))
    parts = [chunk(q[:, start : start + 256], jnp.int32(start)) for start in (0, 256)]
    assert_close(jnp.concatenate(parts, 1), whole)


def test_a_traced_offset_is_rounded_down_to_a_query_tile(rng):
    q, k, v = random_qkv(rng, 1, 64, 256, 2, 1, 64)
    plan = a_shape_plan(1, 2, sink=1, window=64)
    at = lambda offset: sparse_attention(q, k, v, plan, q_offset=jnp.int32(offset), implementation="reference")  # noqa: E731
    np.testing.assert_array_equal(at(130), at(128))


def test_gradients_equal_those_of_the_oracle(rng):
    q, k, v = random_qkv(rng, 2, 300, 430, 4, 2, 64)
    plan, lengths = random_plan(rng, 2, 4, 300, 430), int32([428, 200])
    weights = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)

    def loss(implementation):
        def run(q, k, v):
            out, lse = sparse_attention(
                q, k, v, plan, lengths=lengths, q_offset=128, implementation=implementation, return_lse=True
            )
            return (out * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

        return jax.jit(jax.grad(run, (0, 1, 2)))

    for actual, expected in zip(loss("xla")(q, k, v), loss("reference")(q, k, v), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)  # sums over up to 428 rows of products of normals


def test_dense_gradients_equal_those_of_the_oracle(rng):
    q, k, v = random_qkv(rng, 1, 300, 300, 4, 2, 64)

    def gradients(implementation):
        return jax.grad(lambda q, k, v: (dense_attention(q, k, v, implementation=implementation) ** 2).sum(), (0, 1, 2))

    for actual, expected in zip(gradients("xla")(q, k, v), gradients("reference")(q, k, v), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_pattern_functions_equal_their_plans(rng):
    q, k, v = random_qkv(rng, 1, 300, 300, 2, 1, 64)
    a_shape = a_shape_attention(q, k, v, sink=5, window=100)
    assert_close(a_shape, sparse_attention(q, k, v, a_shape_plan(1, 2, sink=5, window=100), implementation="reference"))
    columns, slashes = int32([[[7, 250, -1], [3, 3, 299]]]), int32([[[0, 150], [77, -1]]])
    plan = vertical_slash_plan(columns, slashes, kv_len=300)
    out = vertical_slash_attention(q, k, v, columns, slashes)
    assert_close(out, sparse_attention(q, k, v, plan, implementation="reference"))
    blocks = int32([[[[-1, -1], [1, 0], [3, -1]], [[0, 0], [-1, 1], [2, 9]]]])
    out, mask = block_sparse_attention(q, k, v, blocks), np.zeros((2, 300, 300), bool)
    for head in range(2):
        for i in range(3):
            for tile in [*np.asarray(blocks)[0, head, i], 2 * i, 2 * i + 1]:
                if tile >= 0:
                    mask[head, 128 * i : 128 * i + 128, 64 * tile : 64 * tile + 64] = True
    mask &= np.tril(np.ones((300, 300), bool))
    assert_close(out, jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[None]))


def test_vmap_scan_and_shard_map_change_nothing(rng):
    q, k, v = random_qkv(rng, 2, 256, 256, 2, 2, 64)
    plan = random_plan(rng, 2, 2, 256, 256)
    expected = sparse_attention(q, k, v, plan)
    add_axis = lambda tree: jax.tree.map(lambda x: x[:, None], tree)  # noqa: E731
    mapped = jax.vmap(sparse_attention)(*add_axis((q, k, v, plan)))[:, 0]
    assert_close(mapped, expected)
    _, scanned = jax.lax.scan(lambda c, x: (c, sparse_attention(*x)), 0, add_axis((q, k, v, plan)))
    assert_close(scanned[:, 0], expected)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
    heads = PartitionSpec(None, None, "heads")
    parts = SparsePlan(*(PartitionSpec(None, "heads") for _ in range(6)))
    sharded = jax.shard_map(
        sparse_attention, mesh=mesh, in_specs=(heads, heads, heads, parts), out_specs=heads, check_vma=False
    )
    assert_close(jax.jit(sharded)(q, k, v, plan), expected)


def test_bad_arguments_name_themselves(rng):
    q, k, v = random_qkv(rng, 1, 128, 128, 4, 2, 64)
    plan = a_shape_plan(1, 4, sink=1, window=64)
    cases = [
        (lambda: sparse_attention(q[0], k, v, plan), ValueError, r"q must have four axes.*\(128, 4, 64\)"),
        (lambda: sparse_attention(q, k, v[:, :64], plan), ValueError, r"k and v.*\(1, 128, 2, 64\).*\(1, 64, 2, 64\)"),
        (lambda: sparse_attention(q[:, :, :3], k, v, plan), ValueError, "multiple of KV heads"),
        (lambda: sparse_attention(q, k[:, :64], v[:, :64], plan), ValueError, "more positions than k"),
        (lambda: sparse_attention(q, k.astype(jnp.bfloat16), v, plan), TypeError, "share one dtype"),
        (lambda: sparse_attention(q.astype(jnp.int32), k, v, plan), TypeError, "q must be floating"),
        (
            lambda: sparse_attention(q, k, v, a_shape_plan(1, 2, sink=1, window=64)),
            ValueError,
            r"plan\.columns.*expected",
        ),
        (lambda: sparse_attention(q, k, v, plan, lengths=int32([1, 2])), ValueError, "lengths must have shape"),
        (lambda: sparse_attention(q, k, v, plan, lengths=jnp.ones(1)), TypeError, "lengths must be integers"),
        (lambda: sparse_attention(q, k, v, plan, q_offset=64), ValueError, "q_offset must be a multiple of 128"),
        (lambda: sparse_attention(q, k, v, plan, q_offset=128), ValueError, "exceed the 128 positions"),
        (lambda: sparse_attention(q, k, v, plan, scale=-1.0), ValueError, "scale must be a positive"),
        (lambda: sparse_attention(q, k, v, plan, implementation="triton"), ValueError, "implementation must be"),
        (lambda: sparse_attention(q, k, v, plan, implementation="hopper"), ValueError, "bfloat16 or float16"),
        (lambda: dense_attention(q, k, v, implementation="cudnn"), ValueError, "bfloat16 or float16"),
        (lambda: a_shape_attention(q, k, v, sink=-1, window=64), ValueError, "sink must be >= 0"),
        (lambda: vertical_slash_attention(q, k, v, int32([[[1]]]), int32([[[1]]])), ValueError, "columns has shape"),
        (lambda: block_sparse_attention(q, k, v, int32([[[1]]])), ValueError, "blocks must be int32"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_dense_attention_of_the_kernel_lowers_for_cuda(rng):
    q, k, v = random_qkv(rng, 1, 128, 384, 2, 1, 64, "bfloat16")
    attend = jax.jit(lambda q, k, v: dense_attention(q, k, v, q_offset=256, implementation="hopper", return_lse=True))
    text = attend.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        dense_attention(*(x.astype(jnp.float32) for x in (q, k, v)), q_offset=256, implementation="hopper")
