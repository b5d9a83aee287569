"""Rotating and appending in one kernel (interpreted), and a whole decoding step of kernels, against plain jnp."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from numpy_llama import random_llama

from minference_jax.models import cache as caches
from minference_jax.models import forward, residual, stacked
from minference_jax.models.cache import KVCache
from minference_jax.models.config import LlamaConfig
from minference_jax.models.layers import finish_layer
from minference_jax.models.norms import rms_norm
from minference_jax.models.rope import Turns
from pallas_kernels.decode import attention
from pallas_kernels.decode.append import rotate_and_append, unsupported_reason
from pallas_kernels.decode.norm import add_and_norm
from pallas_kernels.decode.split import split_attention
from pallas_kernels.device import lowering_for


def interpret_kernels(monkeypatch):
    """Kernels, interpreted, where a GPU would run them."""
    for module, name in (
        (stacked, "stacked_matvec"),
        (residual, "add_and_norm"),
        (caches, "rotate_and_append"),
    ):
        monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=True))
    monkeypatch.setattr(attention, "split_attention", lambda *x, **k: split_attention(*x, **k | {"interpret": True}))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cuda, default: cuda(*x))


def test_queries_and_keys_are_turned_and_rows_written_where_they_belong(rng):
    layers, b, s, n, kv, h = 2, 3, 4, 4, 2, 16
    q, k, v = (jnp.asarray(rng.standard_normal((b, heads, h)), jnp.bfloat16) for heads in (n, kv, kv))
    angles = rng.uniform(0, 7, (layers, b, h // 2))
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    growth = jnp.asarray(rng.uniform(1, 2, (layers, b)), jnp.float32)
    full = (layers, b, s, kv, h)
    cache = KVCache(
        *(jnp.asarray(rng.standard_normal(full), jnp.bfloat16) for _ in range(2)),
        tokens=jnp.zeros((b, s), jnp.int32),
        lengths=jnp.zeros((b,), jnp.int32),
    )
    positions = jnp.asarray([0, 3, 4])  # the last one's cache is full
    for scale in (growth, None):
        expected = jax.jit(
            lambda cache, q, k, v, scale: cache.append_rotated(
                jnp.int32(1), positions, q, k, v, Turns(cos, sin, scale), False
            )
        )(cache, q, k, v, scale)
        got = jax.jit(partial(rotate_and_append, interpret=True))(
            q, k, v, cos, sin, scale, cache.k, cache.v, jnp.int32(1), positions
        )
        for x, y in zip(got, (expected[0], expected[1].k, expected[1].v), strict=True):
            np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))


@pytest.mark.parametrize("offset", [None, 1.0])
def test_the_norm_of_a_sum(rng, offset):
    x, added = (jnp.asarray(100 * rng.standard_normal((2, 200)), dtype) for dtype in ("bfloat16", "float32"))
    weights = jnp.asarray(rng.uniform(0.5, 2, (2, 200)), jnp.bfloat16)
    add = jax.jit(partial(add_and_norm, eps=1e-5, offset=offset, interpret=True))
    total, rows = add(x, added, weights, jnp.int32(1))
    np.testing.assert_array_equal(total, x + added.astype(jnp.bfloat16))
    assert rows.dtype == jnp.bfloat16 and relative_error(rows, rms_norm(total, weights[1], 1e-5, offset)) < 6e-3


@pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")
def test_warps_are_a_power_of_two_at_any_width():
    # The compiler of Triton's kernels ends the process otherwise.
    shape = jax.ShapeDtypeStruct
    for width in (1536, 2560, 2880, 5120, 7168, 16384):
        x, weights = shape((1, width), jnp.bfloat16), shape((2, width), jnp.bfloat16)
        with lowering_for("9.0"):
            traced = jax.jit(partial(add_and_norm, eps=1e-5)).trace(x, x, weights, shape((), jnp.int32))
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        (warps,) = re.findall(r"num_warps = (\d+)", text)
        assert int(warps) in (1, 2, 4, 8, 16)


def test_only_a_decoding_step_adds_and_normalises_at_once(monkeypatch):
    # A prefill's norms are XLA's on a mesh too, where layers are slices of stacked ones: its numbers are one device's.
    config = LlamaConfig(61, 64, 64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32)
    model = random_llama(config, dtype="bfloat16")
    layer = stacked.StackedLayer(forward.stacked_layers(model.params()), jnp.int32(0))
    calls = []
    monkeypatch.setattr(residual.Residual, "normed", lambda self, *_: calls.append(self.x.shape) or (self.x, self.x))
    for rows in (1, 2):
        shapes = (jax.ShapeDtypeStruct((1, rows, *rest), jnp.bfloat16) for rest in ((64,), (4, 32)))
        jax.eval_shape(partial(finish_layer, config, layer), *shapes)
    assert calls == [(1, 1, 64)]


@pytest.mark.usefixtures("unchecked")
def test_it_says_what_it_cannot_serve():
    q, cos, cache = jnp.zeros((1, 2, 32), jnp.bfloat16), jnp.zeros((1, 1, 8)), jnp.zeros((1, 1, 8, 1, 32), jnp.bfloat16)
    assert "all of a head is rotated" in str(unsupported_reason(q, cos, cache))
    with pytest.raises(ValueError, match="one dtype of 16 bits"):
        caches_of = cache.astype(jnp.float32), cache.astype(jnp.float32)
        rotate_and_append(q, q[:, :1], q[:, :1], cos, cos, None, *caches_of, jnp.int32(0), jnp.asarray([0]))
    cos = jnp.zeros((1, 1, 16))
    with pytest.raises(ValueError, match=r"k must be bfloat16 \(1, 1, 32\), got bfloat16 \(1, 2, 32\)"):
        rotate_and_append(q, q, q[:, :1], cos, cos, None, cache, cache, jnp.int32(0), jnp.asarray([0]))
    assert "do not fit k_cache" in str(unsupported_reason(jnp.tile(q, (2, 1, 1)), cos, cache))
    assert "nothing in" in str(unsupported_reason(q[:0], cos, cache))
    row, weights = jnp.zeros((1, 64), jnp.bfloat16), jnp.zeros((2, 64), jnp.bfloat16)
    for arguments in (
        (row, row[:, :32], weights),
        (row, row, weights.astype(jnp.float32)),
        (row[:0], row[:0], weights),
    ):
        with pytest.raises(ValueError, match="add_and_norm"):
            add_and_norm(*arguments, jnp.int32(0), eps=1e-5)


def test_a_step_of_kernels_is_that_of_plain_jnp(rng, monkeypatch):
    config = LlamaConfig(61, 64, 192, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32)
    model = random_llama(config, dtype="bfloat16")
    rows = jnp.asarray(rng.standard_normal((2, 1, 100, 2, 32)), jnp.bfloat16)
    full = KVCache.empty(config, 1, 128, "bfloat16").write(jnp.int32(1), jnp.int32(0), *rows)
    full = dataclasses.replace(full, lengths=jnp.asarray([100]))
    step = partial(forward.decode, config, model.params(), jnp.asarray([3]))
    expected, plain_cache = step(full)
    interpret_kernels(monkeypatch)
    got, kernel_cache = step(full)
    assert relative_error(got, expected) < 0.02
    for x, y in zip(kernel_cache.read(1, jnp.float32), plain_cache.read(1, jnp.float32), strict=True):
        assert relative_error(x, y) < 0.02
    np.testing.assert_array_equal(kernel_cache.lengths, full.lengths + 1)
