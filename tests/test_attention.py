"""Index, plan and attention together: against the oracle on the plan, mixes of heads, scans over layers, chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_qkv

import pallas_kernels
from minference_jax import (
    AShape,
    BlockSparse,
    Dense,
    HeadPatterns,
    VerticalSlash,
    make_plan,
    recall,
    sparse_attention,
)
from minference_jax.index import recall as index_recall
from minference_jax.index.recall import estimated_recall
from pallas_kernels.plan_check import lists_are_clean

PLAN = jax.jit(make_plan, static_argnames="pattern")
MIX = (Dense(), AShape(4, 70), VerticalSlash(10, tiles=1), BlockSparse(3))


def test_every_kind_in_one_launch(rng):
    """Heads of four kinds share a plan; each equals the head planned on its own."""
    q, k, v = random_qkv(rng, 2, 300, 300, 4, 4, 16)
    lengths = jnp.asarray([300, 170], jnp.int32)
    plan = make_plan(q, k, MIX, lengths=lengths)
    assert plan.clean and lists_are_clean(plan).all()
    mask = plan.to_mask(300, 300, lengths=lengths)
    for head, pattern in enumerate(MIX):
        one = slice(head, head + 1)
        alone = make_plan(q[:, :, one], k[:, :, one], pattern, lengths=lengths)
        np.testing.assert_array_equal(mask[:, one], alone.to_mask(300, 300, lengths=lengths))
    out, info = sparse_attention(q, k, v, MIX, lengths=lengths, return_info=True)
    expected = pallas_kernels.sparse_attention(q, k, v, plan, lengths=lengths, implementation="reference")
    assert_close(out, expected)
    np.testing.assert_allclose(info.density, plan.density(300, 300, lengths=lengths), rtol=1e-6)
    np.testing.assert_allclose(info.density[:, 0], 1, rtol=1e-6)
    assert info.implementation == "xla"
    assert info.reason


def test_layers_by_scan_equal_layers_by_hand(rng):
    """Patterns as scanned arrays; a layer whose heads are all dense skips the index."""
    patterns = HeadPatterns((MIX[1:3], (Dense(), Dense()), (VerticalSlash(5, 60), BlockSparse(3))))
    q, k, v = random_qkv(rng, 1, 256, 256, 2, 1, 16)
    _, outs = jax.jit(lambda a: jax.lax.scan(lambda c, layer: (c, sparse_attention(q, k, v, layer)), 0, a))(
        patterns.arrays()
    )
    for index in range(3):
        alone = sparse_attention(q, k, v, patterns.layer(index), implementation="reference")
        assert_close(outs[index], alone)


@pytest.mark.parametrize("pattern", [VerticalSlash(), BlockSparse(8), Dense()], ids=["lines", "blocks", "dense"])
def test_budgets_that_cover_everything_are_dense(rng, pattern):
    q, k, v = random_qkv(rng, 1, 200, 200, 2, 1, 16)
    out, info = sparse_attention(q, k, v, pattern, return_info=True)
    assert_close(out, pallas_kernels.dense_attention(q, k, v, implementation="reference"))
    np.testing.assert_array_equal(info.recall, 1)
    assert "dense" in info.reason


def test_chunks_with_traced_offset_stay_sparse_and_equal_the_oracle(rng):
    q, k, v = random_qkv(rng, 1, 512, 512, 2, 1, 16)
    pattern = VerticalSlash(columns=8, tiles=1)

    @jax.jit
    def chunk(q, offset):
        lengths = jnp.full((1,), offset + 256)
        plan = make_plan(q, k, pattern, lengths=lengths, q_offset=offset)
        return sparse_attention(q, k, v, pattern, lengths=lengths, q_offset=offset), plan

    for offset in (0, 256):
        out, plan = chunk(q[:, offset : offset + 256], jnp.int32(offset))
        expected = pallas_kernels.sparse_attention(
            q[:, offset : offset + 256], k, v, plan, q_offset=offset, implementation="reference"
        )
        assert_close(out, expected)


def test_recall_is_the_mass_inside_the_mask(rng):
    q, k, _ = random_qkv(rng, 2, 300, 300, 4, 2, 16)
    lengths = jnp.asarray([300, 130], jnp.int32)
    plan = PLAN(q, k, MIX, lengths=lengths)
    scores = np.einsum("btnh,bsnh->bnts", np.asarray(q), np.repeat(np.asarray(k), 2, axis=2)) / 4
    causal = np.tril(np.ones((300, 300), bool))
    weights = np.where(causal, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights /= weights.sum(-1, keepdims=True)
    inside = (weights * np.asarray(plan.to_mask(300, 300, lengths=lengths))).sum(-1)
    expected = np.stack([inside[i, :, : int(lengths[i])].mean(-1) for i in range(2)])
    np.testing.assert_allclose(jax.jit(recall)(q, k, plan, lengths=lengths), expected, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_named(rng):
    q, k, v = random_qkv(rng, 1, 128, 128, 2, 1, 16)
    with pytest.raises(ValueError, match="3 entries; q has 2 heads"):
        sparse_attention(q, k, v, [Dense()] * 3)
    with pytest.raises(ValueError, match="more positions than k"):
        make_plan(q, k[:, :64], Dense())
    with pytest.raises(ValueError, match="lengths must have shape"):
        make_plan(q, k, Dense(), lengths=jnp.zeros((2,), jnp.int32))


@pytest.mark.parametrize("at_once", [1, 2 * 320 * 64, 1 << 23])
def test_estimated_recall_is_exact_where_every_row_is_a_probe(rng, monkeypatch, at_once):
    monkeypatch.setattr(index_recall, "CELLS", at_once)
    q, k, _ = random_qkv(rng, 2, 64, 320, 4, 2, 16)
    where = {"lengths": jnp.asarray([320, 290], jnp.int32), "q_offset": jnp.int32(256)}
    plan = make_plan(q, k, MIX, **where)
    estimate = estimated_recall(q, k, plan, scale=0.25, **where)
    np.testing.assert_allclose(estimate, recall(q, k, plan, scale=0.25, **where), atol=1e-5)
    assert 0 < float(estimate.min()) < 1


@pytest.mark.parametrize(
    "pattern, multiple",
    [
        (VerticalSlash(columns=8, slashes=60), 1),
        (VerticalSlash(columns=8, tiles=3, probes="spread"), 64),
        (AShape(sink=8, window=100), 64),
    ],
)
def test_plans_promise_whole_tiles_unless_lines_are_counted(rng, pattern, multiple):
    """The promise lets the kernel copy whole rows; a band that broke it would be dropped."""
    q, k, _ = random_qkv(rng, 1, 400, 400, 2, 1, 16)
    plan = PLAN(q, k, pattern)
    assert plan.band_multiple == multiple
    assert plan.bands is not None and plan.band_count is not None and int(plan.band_count.min()) > 0
    listed = np.arange(plan.bands.shape[-1]) < np.asarray(plan.band_count)[..., None]
    assert (np.asarray(plan.bands)[listed] % multiple == 0).all()
