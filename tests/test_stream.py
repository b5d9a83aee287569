"""Rows sent to other devices in pieces give what one device computes, whatever the pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_llama import random_llama

from minference_jax.models.config import LlamaConfig
from minference_jax.parallel import make_mesh, stream
from minference_jax.parallel.exchange import Exchange

CONFIG = LlamaConfig(96, 64, 112, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=16)


def test_pieces_are_the_rows_in_order(monkeypatch):
    monkeypatch.setattr(stream, "LEAST", 40)
    x = jnp.arange(2 * 801 * 3, dtype=jnp.float32).reshape(2, 801, 3)
    mesh = Exchange(make_mesh(heads=2))
    sizes = {rows: [piece.shape[1] for piece in stream.cut(mesh, x[:, :rows])] for rows in (30, 100, 801)}
    assert sizes == {30: [30], 100: [40, 40, 20], 801: [101] * 7 + [94]}
    np.testing.assert_array_equal(stream.whole(stream.cut(mesh, x)), x)
    assert len(stream.cut(Exchange(), x)) == 1


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
