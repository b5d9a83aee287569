"""FP8 products put in their place, by the kernel (interpreted) and by the jnp chain: the same numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from numpy_llama import random_llama

from minference_jax.models import LlamaConfig, fp8, placed
from minference_jax.models.chunks import map_chunks, plain
from minference_jax.models.layers import QKV, into_block, project, project_qkv, rotated
from minference_jax.models.placed import rotated_product
from minference_jax.models.rope import Turns, apply_rope, layer_rope, turns
from minference_jax.parallel import make_mesh, stream
from minference_jax.parallel.exchange import Exchange
from pallas_kernels.device import Device, lowering_for
from pallas_kernels.rows.place import Place, placed_rows, unsupported_reason
from pallas_kernels.tracing import under_own_settings

CONFIG = LlamaConfig(61, 64, 128, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32)
STRICT = {"xla_allow_excess_precision": False}
"""Roundings to bfloat16 are left out otherwise."""


def fp8_layer(config=CONFIG):
    params = random_llama(config, dtype="bfloat16").with_fp8_projections().params()
    return {name.removeprefix("layers."): y[0] for name, y in params.items() if name.startswith("layers.")}


def projected(layer, x, positions, chunk):
    """Queries, keys and values of all rows."""
    rope = layer_rope(CONFIG, jnp.full((1,), 99, jnp.int32), 0)

    def of_chunk(rows, positions):
        return project_qkv(CONFIG, layer, rows, turns(CONFIG, rope, positions.rows))

    return map_chunks(of_chunk, (x, positions), chunk)


def arguments(rng, b, c, n, h, sequences):
    y = jnp.asarray(rng.standard_normal((b, c, n * h)) * 100, jnp.bfloat16)
    scales = (jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32) for shape in ((b, c), (n, h)))
    angles = rng.uniform(0, 6, (sequences, c, h // 2))
    return y, *scales, tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))


def assert_alike(got, want):
    """The same, unless a sum whose product one of two compilers does not round crosses a rounding boundary."""
    got, want = (np.asarray(x.astype(jnp.float32)) for x in (got, want))
    assert (got != want).mean() < 2e-3
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-7 * np.abs(want).max())


def chain(into, at, y, row_scale, channel_scale, turn, heads=None):
    (b, c, f), (n, h) = y.shape, channel_scale.shape
    x = fp8.rescaled(y.reshape(-1, f), row_scale.reshape(-1), channel_scale.reshape(-1), y.dtype).reshape(b, c, n, h)
    x = x if turn is None else apply_rope(x, *turn)
    x = jax.lax.dynamic_slice_in_dim(x, at.first, heads or n, axis=2)
    return jax.lax.dynamic_update_slice(into, x, (*at[:3], 0))


# Three heads are no power of two: a thread block has one. Of 64 heads a block has half, or a quarter if nothing turns.
@pytest.mark.parametrize(("n", "h", "sequences"), [(3, 16, 1), (64, 128, 2)])
@pytest.mark.parametrize("turned", [True, False])
def test_the_kernel_gives_what_the_chain_gives(rng, n, h, sequences, turned):
    *arrays, turn = arguments(rng, 2, 4, n, h, sequences)
    into = jnp.asarray(rng.standard_normal((2, 11, n, h)), jnp.bfloat16)
    kernel = jax.jit(partial(placed_rows, interpret=True), compiler_options=STRICT)
    expected = jax.jit(chain, compiler_options=STRICT)
    for start in (0, 3, 9):  # rows from 9 on would end past the array: they begin at 7
        inputs = into, Place(row=jnp.int32(start)), *arrays, turn if turned else None
        assert_alike(*(run(*inputs) for run in (kernel, expected)))


@pytest.mark.parametrize("turned", [True, False])
def test_some_heads_go_to_any_place(rng, turned):
    """Two of six heads; places too far on, in the last case, are clipped alike."""
    *arrays, turn = arguments(rng, 2, 4, 6, 16, 2)
    into = jnp.asarray(rng.standard_normal((5, 9, 7, 16)), jnp.bfloat16)
    kernel = jax.jit(partial(placed_rows, heads=2, interpret=True), compiler_options=STRICT)
    expected = jax.jit(partial(chain, heads=2), compiler_options=STRICT)
    for at in (Place(2, 3, 4, 2), Place(1, 0, 5, 4), Place(3, 5, 5, 0), Place(9, 9, 9, 9)):
        inputs = into, Place(*map(jnp.int32, at)), *arrays, turn if turned else None
        assert_alike(*(run(*inputs) for run in (kernel, expected)))


def test_many_calls_at_once(rng):
    into = jnp.zeros((1, 9, 2, 16), jnp.bfloat16)
    inputs = [(into, Place(*map(jnp.int32, (0, start, 0, 0))), *arguments(rng, 1, 4, 2, 16, 1)) for start in (0, 5)]
    many = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
    found = jax.jit(jax.vmap(partial(placed_rows, interpret=True)), compiler_options=STRICT)(*many)
    for got, one in zip(found, inputs, strict=True):
        assert_alike(got, jax.jit(chain, compiler_options=STRICT)(*one))


def test_what_the_kernel_cannot_serve_it_refuses(rng):
    *arrays, turn = arguments(rng, 2, 4, 2, 24, 1)
    with pytest.raises(ValueError, match="placed_rows: head_dim must be a power of two from 16 on, got 24"):
        placed_rows(jnp.zeros((2, 11, 2, 24), jnp.bfloat16), Place(), *arrays, turn)
    for rows, into, heads, dtype, why in (
        ((2, 4, 48), (2, 11, 3, 16), None, jnp.float32, "reads and writes bfloat16"),
        ((2, 4, 48), (2, 11, 2, 16), None, jnp.bfloat16, "3 heads of rows of shape (2, 4, 48) do not fit an array"),
        ((2, 4, 48), (2, 11, 9, 16), 4, jnp.bfloat16, "4 heads of rows of shape (2, 4, 48) do not fit an array"),
        ((2, 4, 40), (2, 11, 2, 16), None, jnp.bfloat16, "do not fit"),
        ((2, 4, 48), (1, 11, 3, 16), None, jnp.bfloat16, "do not fit"),
        ((2, 4, 48), (2, 3, 3, 16), None, jnp.bfloat16, "do not fit"),
        ((2, 0, 48), (2, 11, 3, 16), None, jnp.bfloat16, "there is nothing"),
        ((1, 1 << 18, 4096), (1, 1 << 20, 32, 128), None, jnp.bfloat16, "addresses less than"),
        ((1, 4, 48), (1, 1 << 30, 3, 16), None, jnp.bfloat16, "less than 2,147,483,648 heads of rows"),
    ):
        y, into = (jax.ShapeDtypeStruct(shape, dtype) for shape in (rows, into))
        assert why in str(unsupported_reason(y, into, heads))


@pytest.mark.parametrize("chunk", [8, 64])
def test_projections_are_those_of_products_that_are_rotated_then(rng, chunk):
    layer, positions = fp8_layer(), jnp.arange(20, dtype=jnp.int32)[None] + 7
    x = jnp.asarray(rng.standard_normal((2, 20, 64)), jnp.bfloat16)

    def apart(x):
        q, k, v = project(layer, QKV, into_block(CONFIG, layer, x, "attn_norm", QKV))
        rope = layer_rope(CONFIG, jnp.full((1,), 99, jnp.int32), 0)
        return *rotated(CONFIG, turns(CONFIG, rope, positions), q, k), v

    found = jax.jit(partial(projected, layer, positions=positions, chunk=chunk), compiler_options=STRICT)(x)
    for got, want in zip(found, jax.jit(apart, compiler_options=STRICT)(x), strict=True):
        assert_alike(got, want)


@pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")
@pytest.mark.parametrize("chunk", [8, 64])
def test_products_are_put_in_place_by_the_kernel_alone(chunk):
    shapes = jax.ShapeDtypeStruct((1, 24, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 24), jnp.int32)
    with lowering_for("9.0"):
        traced = jax.jit(partial(projected, chunk=chunk)).trace(jax.eval_shape(fp8_layer), *shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "placed_rows" in line]
    assert [line.count("output_operand_alias<") for line in calls] == [1] * 3
    assert "dynamic_update_slice" not in text and "apply_rope" not in text


def test_on_two_devices_the_kernel_puts_heads_where_one_has_them(rng, monkeypatch):
    """Of a piece of two chunks and one of one: heads that a device keeps, and those that travel."""
    config = LlamaConfig(61, 64, 128, num_layers=1, num_heads=6, num_kv_heads=2, head_dim=16)
    layer, rope, t = fp8_layer(config), layer_rope(config, jnp.full((1,), 99, jnp.int32), 0), 23
    monkeypatch.setattr(stream, "LEAST", 8)
    monkeypatch.setattr(placed, "on_gpus", lambda kernel, chain: partial(kernel, interpret=True))
    x, axes = jnp.asarray(rng.standard_normal((2, t, 64)), jnp.bfloat16), PartitionSpec(None, None, "heads")

    def heads(exchange, x):
        def of_chunk(rows, positions):
            return project_qkv(config, layer, rows, turns(config, rope, positions))

        pieces = stream.cut(exchange, exchange.own_rows(x), 4)
        assert len(pieces) == (1 if exchange.size == 1 else 2)
        return stream.to_heads(exchange, of_chunk, pieces, exchange.positions(t)[None], t, 4)

    def on(mesh):
        run = jax.shard_map(
            partial(heads, Exchange(mesh)), mesh=mesh, in_specs=PartitionSpec(), out_specs=axes, check_vma=False
        )
        return jax.jit(run, compiler_options=STRICT)(x)

    expected = jax.jit(partial(heads, Exchange()), compiler_options=STRICT)(x)
    for got, want in zip(on(make_mesh(heads=2)), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_derivatives_are_those_of_the_chain(rng, monkeypatch):
    weight, channel_scale = (fp8_layer()[name] for name in ("wq", "wq_scale"))
    rows = fp8.quantize(jnp.asarray(rng.standard_normal((1, 5, 64)), jnp.bfloat16))
    *_, turn = arguments(rng, 1, 5, 2, 32, 1)
    into = jnp.asarray(rng.standard_normal((1, 9, 2, 32)), jnp.bfloat16)

    def gradient(placed):
        def value(into, scale, channel_scale):
            product = rotated_product(fp8.Rows(rows[0], scale, into.dtype), weight, channel_scale, Turns(*turn))
            out = product.place(into, Place(row=3), 2) if placed else plain(product)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        traced = jax.jit(under_own_settings(value))
        with jax.numpy_rank_promotion("raise"):
            run = jax.jit(jax.grad(lambda *y: traced(*y), argnums=(0, 1, 2)), compiler_options=STRICT)
            return run(into, rows[1], channel_scale)

    expected = gradient(False)[1:]
    monkeypatch.setattr(Device, "default", staticmethod(lambda: Device("gpu", "9.0")))
    kept, *found = gradient(True)
    assert not np.any(kept[:, 3:8]) and np.any(kept[:, 8])
    for got, want in zip(found, expected, strict=True):
        assert np.any(want != 0)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_placing_under_shard_map_with_checked_axes(monkeypatch):
    monkeypatch.setattr(Device, "default", staticmethod(lambda: Device("gpu", "9.0")))
    mesh, spec = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("x")
    layer, x = fp8_layer(), jnp.ones((2, 20, 64), jnp.bfloat16)
    run = partial(projected, layer, positions=jnp.arange(20, dtype=jnp.int32)[None], chunk=8)
    found = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    for got, want in zip(found, jax.jit(run)(x), strict=True):
        assert_alike(got, want)
