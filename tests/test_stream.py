"""Rows sent to other devices in pieces give what one device computes, whatever the pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from numpy_llama import random_llama

from minference_jax.models.config import LlamaConfig
from minference_jax.parallel import make_mesh, sharded_layer, stream
from minference_jax.parallel.exchange import Exchange

CONFIG = LlamaConfig(96, 64, 112, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=16)


def test_pieces_are_the_rows_in_order(monkeypatch):
    monkeypatch.setattr(stream, "LEAST", 40)
    x = jnp.arange(2 * 801 * 3, dtype=jnp.float32).reshape(2, 801, 3)
    mesh = Exchange(make_mesh(heads=2))

    def sizes(rows, chunk):
        pieces = stream.cut(mesh, x[:, :rows], chunk)
        np.testing.assert_array_equal(stream.whole(pieces), x[:, :rows])
        return [piece.shape[1] for piece in pieces]

    assert sizes(30, 100) == [30]
    assert sizes(100, 100) == [40, 20, 40]
    assert sizes(640, 160) == [80, 160, 160, 160, 80]
    assert sizes(801, 50) == [50, 1, *[150] * 4, 100, 50]
    for whole in (Exchange(), Exchange(make_mesh(rows=2, heads=1))):  # nothing travels between heads
        assert len(stream.cut(whole, x, 100)) == 1


@pytest.mark.parametrize("mesh", [{"heads": 2}, {"rows": 2, "heads": 1}], ids=("heads", "rows"))
def test_a_prefill_in_pieces_is_that_of_one_device(monkeypatch, mesh):
    monkeypatch.setattr(stream, "LEAST", 40)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 200))
    one = random_llama(CONFIG, "a-shape:sink=16,window=16")
    many = one.on(make_mesh(**mesh))
    found = [
        model.prefill(tokens, np.array([200, 147]), model.init_cache(2, 256), rows_at_once=24) for model in (one, many)
    ]
    for expected, same in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(expected, same)


def test_two_devices_send_only_what_the_other_lacks(monkeypatch):
    monkeypatch.setattr(stream, "LEAST", 40)
    model = random_llama(CONFIG).on(make_mesh(heads=2))
    text = jax.jit(lambda tokens: model.prefill(tokens)[0]).lower(jnp.zeros((1, 200), jnp.int32)).as_text()
    # Of a device's 100 rows in pieces of 40, 20 and 40: q, k and v of the other's heads, and outputs of its rows.
    for rows in (40, 20):
        assert f"tensor<1x{rows}x6x16xf32>) -> tensor<1x{rows}x6x16xf32>" in text
        assert f"tensor<1x1x{rows}x4x16xf32>) -> tensor<1x1x{rows}x4x16xf32>" in text
    assert text.count("stablehlo.collective_permute") == 6 and "all_to_all" not in text


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_large_weight_that_is_copied_is_the_gathered_one(monkeypatch, axis):
    monkeypatch.setattr(sharded_layer, "LARGE", 1)
    x = jnp.arange(4 * 6 * 8, dtype=jnp.float32).reshape(4, 6, 8)
    names = [("rows", "heads") if i == axis else () for i in range(3)]
    cut = PartitionSpec(*(name or None for name in names))

    def whole(x):
        return sharded_layer.gather_for_prefill(x, tuple(names))

    run = jax.jit(
        jax.shard_map(whole, mesh=make_mesh(heads=2), in_specs=cut, out_specs=PartitionSpec(), check_vma=False)
    )
    np.testing.assert_array_equal(run(x), x)
    assert "all_to_all" in run.lower(x).as_text() and "all_gather" not in run.lower(x).as_text()
