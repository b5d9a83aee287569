"""Rows on their way into an FP8 product: the kernels (interpreted) against the jnp chain, one contract for all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_llama import random_llama

from minference_jax.models import LlamaConfig, fp8
from minference_jax.models.chunks import Apart, Slice, map_chunks
from minference_jax.models.config import Traits
from minference_jax.models.experts import gated
from minference_jax.models.layers import finish_layer, rms_norm
from minference_jax.models.llama import Llama
from pallas_kernels.device import Device, lowering_for
from pallas_kernels.rows.launch import RowRange, Tile, unsupported_reason
from pallas_kernels.rows.norms import added_rows, normed_rows
from pallas_kernels.rows.quantize import gated_rows, quantized_rows
from pallas_kernels.tracing import under_own_settings

SIZES = np.array([1, 1e4, 1e-4, 1e-30, 0, 1e15, 1e30, 1, 1])
"""What each row's numbers are multiplied with, before an infinity and a NaN are put into the last two. Squares of 1e30
are no float32 numbers: norms make such a row one of zeros, the chain as the kernels."""


def activation_of(name):
    config = LlamaConfig(61, 32, 40, 1, 1, 1, 32, traits=Traits(activation=name))

    def plain(gate, up, row_scale, gate_scale, up_scale):
        gate = fp8.rescaled(gate, row_scale, gate_scale, gate.dtype)
        return gated(config, gate, fp8.rescaled(up, row_scale, up_scale, up.dtype))

    return plain


def added(x, y, row_scale, channel_scale):
    return x + fp8.rescaled(y, row_scale, channel_scale, x.dtype)


CASES = {
    "plain": (quantized_rows, lambda x: x),
    "norm": (partial(normed_rows, eps=1e-5), partial(rms_norm, eps=1e-5)),
    "norm, offset": (partial(normed_rows, eps=1e-5, offset=1.0), partial(rms_norm, eps=1e-5, offset=1.0)),
    "added": (partial(added_rows, eps=1e-5), lambda *arrays: rms_norm(added(*arrays[:-1]), arrays[-1], 1e-5)),
    "silu": (gated_rows, activation_of("silu")),
    "gelu": (partial(gated_rows, activation="gelu"), activation_of("gelu_tanh")),
}


def arguments(rng, name, width, sizes=SIZES):
    x = rng.standard_normal((len(sizes), width)) * sizes[:, None]
    x[-2, 3], x[-1, 5] = np.inf, np.nan
    columns = rng.uniform(0.5, 2, (2, width))
    if name == "plain":
        return [jnp.asarray(x, jnp.bfloat16)]
    if name.startswith("norm"):
        return [jnp.asarray(y, jnp.bfloat16) for y in (x, columns[0])]
    up, scale = rng.standard_normal(x.shape), rng.uniform(0.5, 2, len(x))
    wide = [jnp.asarray(y, jnp.bfloat16) for y in (x, up)]
    narrow = [jnp.asarray(y, jnp.float32) for y in (scale, *columns)]
    return wide + (narrow if name != "added" else [*narrow[:2], narrow[2].astype(jnp.bfloat16)])


def fp8_layer(config):
    params = random_llama(config, dtype="bfloat16").with_fp8_projections().params()
    return {name.removeprefix("layers."): y[0] for name, y in params.items() if name.startswith("layers.")}


# Rows of 300 are no multiple of a piece, and 9 rows none of a thread block's 2; rows of 96 are less than a piece.
@pytest.mark.parametrize(("width", "tile"), [(300, Tile(2, 1, 1)), (96, None)])
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_what_the_chain_gives(rng, name, width, tile):
    kernel, plain = CASES[name]
    arrays = arguments(rng, name, width)
    strict = {"xla_allow_excess_precision": False}  # roundings to bfloat16 are left out otherwise
    numbers, scale, *total = jax.jit(partial(kernel, tile=tile, interpret=True), compiler_options=strict)(*arrays)
    expected, expected_scale = fp8.quantize(plain(*arrays))
    assert numbers.dtype == fp8.DTYPE and scale.dtype == jnp.float32 and numbers.shape == (len(SIZES), width)
    got, want = (np.asarray(y.astype(jnp.float32)) for y in (numbers, expected))
    if name == "added":
        np.testing.assert_array_equal(*(y.astype(jnp.float32) for y in (*total, added(*arrays[:-1]))))
    whole = np.isfinite(want).all(axis=1)
    # A row with a NaN or an infinity in it is one of NaNs after any product.
    np.testing.assert_array_equal(np.isnan(got).any(axis=1), ~whole)
    if name not in ("silu", "gelu"):
        np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)
        assert (got != want)[whole].mean() < 1e-3  # a sum in another order may cross a rounding boundary
        return
    # jnp rounds to bfloat16 (half a unit in 2^8) six times before, and the largest number of a row is not spared.
    np.testing.assert_allclose(np.asarray(scale)[whole], np.asarray(expected_scale)[whole], rtol=6 / 256)
    got, want = (y[whole] * np.asarray(s)[whole, None] for y, s in ((got, scale), (want, expected_scale)))
    largest = 448 * np.asarray(scale)[whole, None]
    step = np.maximum(np.abs(want) / 8, largest / 500)  # of e4m3, or of what a tanh in bfloat16 leaves of small ones
    assert (np.abs(got - want) <= 1.1 * step).all()


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_rows_of_products_of_any_size(rng, activation):
    """What is left to a row's scale is neither lost below nor above what float32 holds."""
    row_scale = np.array([1e-8, 1e-4, 1, 30, 0], np.float32)
    products = rng.standard_normal((2, 5, 96)) * np.array([3e8, 3e4, 3, 0.1, 0])[:, None]
    gate, up = np.asarray(jnp.asarray(products, jnp.bfloat16))
    columns = rng.uniform(0.1, 2, (2, 96)).astype(np.float32)
    arrays = gate, up, row_scale, *columns
    x, y = (np.float64(a) * row_scale[:, None] * c for a, c in zip((gate, up), columns, strict=True))
    inner = x if activation == "silu" else 2 * 0.7978845608 * (x + 0.044715 * x**3)
    want = x * y / (1 + np.exp(np.minimum(-inner, 700)))
    numbers, scale = jax.jit(partial(gated_rows, activation=activation, interpret=True))(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(scale, np.abs(want).max(axis=1) / 448, rtol=1e-5)
    got = np.asarray(numbers.astype(jnp.float32)) * np.float64(scale)[:, None]
    # Half a step of e4m3: 3 bits of a number, and 2⁻⁹ for those below 2⁻⁶.
    assert (np.abs(got - want) <= 1.001 * np.maximum(np.abs(want) / 16, np.float64(scale)[:, None] / 1024)).all()


@pytest.mark.parametrize("name", ["plain", "norm", "added"])
def test_a_part_is_read_where_it_lies(rng, name):
    whole = jnp.asarray(rng.standard_normal((2, 11, 96)), jnp.bfloat16)
    others = arguments(rng, name, 96, np.ones(8))[1:]
    for start in (0, 3, 7):
        rows = whole[:, start : start + 4]
        part = RowRange(jnp.int32(start), 4)
        found = CASES[name][0](whole, *others, part=part, interpret=True)
        wanted = CASES[name][0](rows.reshape(8, 96), *others, interpret=True)
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize("width", [96, 300])
def test_rows_whose_columns_lie_apart_are_read_where_they_lie(rng, width):
    arrays = tuple(jnp.asarray(rng.standard_normal((2, t, width)), jnp.bfloat16) for t in (11, 4, 7))
    starts, groups = (3, 0, 2), (1, 0, 2)
    slices = tuple(Slice(x[:, at : at + 4], x, jnp.int32(at)) for x, at in zip(arrays, starts, strict=True))
    apart = Apart(slices, jnp.asarray(groups, jnp.int32))
    rows = jnp.concatenate([slices[i].rows for i in (1, 0, 2)], axis=2)
    np.testing.assert_array_equal(apart.rows.astype(jnp.float32), rows.astype(jnp.float32))
    part = RowRange(jnp.asarray(starts, jnp.int32), 4, apart.groups)
    found = quantized_rows(arrays, part=part, interpret=True)
    wanted = quantized_rows(rows.reshape(8, -1), interpret=True)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")
def test_no_slice_is_made_for_a_kernel_that_reads_a_part():
    config = LlamaConfig(61, 64, 128, 1, 2, 1, 32)

    def whole(layer, *arrays):
        return map_chunks(partial(finish_layer, config, layer), arrays, 8, in_place=True)

    def apart(layer, groups, *arrays):
        def finished(x, *parts):
            return finish_layer(config, layer, x, Apart(parts, groups))

        return map_chunks(finished, arrays, 8, in_place=True)

    def kernels(run, *arguments):
        with lowering_for("9.0"):
            text = jax.jit(run).trace(layer, *arguments).lower(lowering_platforms=("cuda",)).as_text()
        calls = [line for line in text.splitlines() if "xla.gpu.triton" in line]
        return [[line for line in calls if name in line] for name in ("quantized_rows", "added_rows")]

    layer = jax.eval_shape(partial(fp8_layer, config))
    x, out, heads = (jax.ShapeDtypeStruct((1, 24, *row), jnp.bfloat16) for row in ((64,), (2, 32), (1, 32)))
    (quantized,), (added,) = kernels(whole, x, out)
    assert "(tensor<1x24x64xbf16>, tensor<1xi32>) ->" in quantized
    assert "(tensor<1x24x64xbf16>, tensor<8x64xbf" in added and "tensor<1xi32>) ->" in added
    (quantized,), _ = kernels(apart, jax.ShapeDtypeStruct((2,), jnp.int32), x, heads, heads)
    assert f"({'tensor<1x24x32xbf16>, ' * 2}tensor<2xi32>, tensor<2xi32>) ->" in quantized


def test_what_the_kernels_cannot_serve_they_refuse():
    for x in (jnp.zeros((2, 64)), jnp.zeros((2, 40_000), jnp.bfloat16), jnp.zeros((0, 64), jnp.bfloat16)):
        assert unsupported_reason(x) is not None
        with pytest.raises(ValueError, match="quantized_rows: "):
            quantized_rows(x)
    huge = jax.ShapeDtypeStruct((1 << 20, 2048), jnp.bfloat16)
    assert "addresses less than" in str(unsupported_reason(huge))


@pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")
@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_a_prefill_in_fp8_holds_the_kernels_where_a_gpu_has_the_numbers(capability):
    config = LlamaConfig(61, 64, 128, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32)
    kernels = ("quantized_rows", "normed_rows", "gated_rows", "added_rows")
    for dtype, names in (("bfloat16", kernels), ("float32", ())):
        model = jax.eval_shape(
            lambda dtype=dtype: Llama.random(config, jax.random.key(0), dtype).with_fp8_projections()
        )
        tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)
        with lowering_for(capability):
            traced = jax.jit(lambda model, tokens: model.prefill(tokens)[0]).trace(model, tokens)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        for name in kernels:
            assert (name in text) == (capability == "9.0" and name in names)


@pytest.mark.parametrize("name", ["silu", "norm"])
def test_derivatives_are_those_of_the_chain(rng, monkeypatch, name):
    """Of a program that is traced before it is differentiated, whatever the caller's settings."""
    arrays = arguments(rng, name, 96, np.ones(5))
    arrays = [y[:3] if len(y) == 5 else y for y in arrays]
    kernel, chain = CASES[name]

    def value(quantized, *arrays):
        numbers, scale, *_ = quantized(*arrays)
        return jnp.sum(numbers.astype(jnp.float32) * scale[:, None])

    def gradient(quantized):
        traced = jax.jit(under_own_settings(partial(value, quantized)))
        with jax.numpy_rank_promotion("raise"):
            return jax.jit(jax.grad(lambda *y: traced(*y), argnums=(0, len(arrays) - 1)))(*arrays)

    expected = gradient(under_own_settings(lambda *y: fp8.quantize(chain(*y))))
    monkeypatch.setattr(Device, "default", staticmethod(lambda: Device("gpu", "9.0")))
    for got, want in zip(gradient(partial(fp8.quantized, kernel, chain)), expected, strict=True):
        assert np.any(want != 0)
        np.testing.assert_array_equal(got, want)


def test_kernels_and_chunks_under_shard_map_with_checked_axes(monkeypatch):
    monkeypatch.setattr(Device, "default", staticmethod(lambda: Device("gpu", "9.0")))
    config, mesh = LlamaConfig(61, 64, 128, 1, 2, 1, 32), jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    layer = fp8_layer(config)

    def finished(x, out):
        return map_chunks(partial(finish_layer, config, layer), (x, out), 8)

    x, out = jnp.ones((2, 24, 64), jnp.bfloat16), jnp.ones((2, 24, 2, 32), jnp.bfloat16)
    spec = jax.sharding.PartitionSpec("x")
    found = jax.jit(jax.shard_map(finished, mesh=mesh, in_specs=(spec, spec), out_specs=spec))(x, out)
    np.testing.assert_array_equal(found.astype(jnp.float32), jax.jit(finished)(x, out).astype(jnp.float32))
