"""FP8 projections: quantized rows, scaled products, whole models, and what a GPU is given to multiply."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from numpy_llama import random_llama

from minference_jax.models import LlamaConfig, forward, fp8, param_shapes
from minference_jax.models.config import Traits
from minference_jax.models.llama import Llama
from pallas_kernels.device import lowering_for

TINY = LlamaConfig(61, 32, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, traits=Traits(qkv_bias=True))


def test_a_row_is_numbers_times_its_own_scale():
    numbers, scale = fp8.quantize(jnp.asarray([[448.0, -224.0, 1.0], [0.0, 0.0, 0.0], [2e-30, 1e-30, 0.0]]))
    np.testing.assert_allclose(scale, [1.0, 0.0, 2e-30 / 448], rtol=1e-6)
    np.testing.assert_array_equal(numbers.astype(jnp.float32), [[448, -224, 1], [0, 0, 0], [448, 224, 0]])


def test_products_of_representable_numbers_are_exact():
    # Every entry is a power of two, and so is each row's largest over 448 = 1.75 * 256: nothing is rounded.
    x = 1.75 * jnp.asarray([[1.0, 2.0], [0.5, 0.25]])
    weight = 1.75 * jnp.asarray([[1.0, 4.0, 0.0], [2.0, 1.0, 0.0]])
    numbers, scale = fp8.quantize_weight(weight[None], 1)
    assert numbers.shape == (1, 3, 2) and scale.shape == (1, 3)
    got = fp8.product(fp8.rows_of(x), numbers[0], scale[0])
    np.testing.assert_array_equal(got, x @ weight)


def test_two_summed_axes_and_float16_sums_past_its_range(rng):
    attended = jnp.asarray(100 * rng.standard_normal((2, 3, 4, 8)), jnp.float16)
    weight = jnp.asarray(rng.standard_normal((1, 4, 8, 5)), jnp.float16)
    numbers, scale = fp8.quantize_weight(weight, 2)
    assert numbers.shape == (1, 5, 4, 8)
    got = fp8.product(fp8.rows_of(attended.reshape(2, 3, 32)), numbers[0], scale[0])
    expected = np.einsum("btnh,nhd->btd", np.asarray(attended, np.float64), np.asarray(weight[0], np.float64))
    assert got.dtype == jnp.float16 and relative_error(got, expected) < 0.06


def test_a_model_in_fp8_is_close_keeps_its_other_weights_and_decodes(rng):
    model = random_llama(TINY)
    narrow = model.with_fp8_projections()
    tokens = jnp.asarray(rng.integers(0, 61, (1, 20)))
    assert narrow.fp8_projections and not model.fp8_projections and narrow.dtype == jnp.float32
    assert narrow.params()["embed"] is model.params()["embed"]
    assert narrow.params()["layers.w_down"].dtype == jnp.float8_e4m3fn
    expected, got = model(tokens), narrow(tokens)
    assert 0.001 < relative_error(got, expected) < 0.15
    logits, cache = narrow.prefill(tokens[:, :19], None, narrow.init_cache(1, 20))
    logits, _ = narrow.decode(tokens[:, 19], cache)
    np.testing.assert_allclose(logits, got[:, -1], atol=2e-2)
    again = fp8.quantize_params(narrow.params())
    assert all(again[name] is value for name, value in narrow.params().items())


def test_a_gpu_multiplies_the_head_with_two_rows():
    """Of one XLA makes a float32 product of a float32 copy of the head, where it has no Triton products."""
    model = random_llama(TINY)
    rows, last = jax.ShapeDtypeStruct((1, 9, 32), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    for network, count in ((model, 1), (model.with_fp8_projections(), 2)):
        head = jax.jit(partial(forward.last_logits, TINY, t=9))
        with lowering_for("9.0"):
            text = head.trace(network.params(), rows, last).lower(lowering_platforms=("cuda",)).as_text()
        assert f"-> tensor<1x{count}x61xf32>" in text
    tokens = jnp.arange(9, dtype=jnp.int32)[None]
    assert model.with_fp8_projections().prefill(tokens)[0].shape == (1, 61)


def test_shapes_are_known_and_half_quantized_parameters_refused():
    params = random_llama(TINY).params()
    narrow = fp8.quantize_params(params)
    assert {name: value.shape for name, value in narrow.items()} == fp8.fp8_shapes(param_shapes(TINY))
    with pytest.raises(ValueError, match=r"layers\.wq_scale is missing"):
        Llama.from_params(TINY, {name: value for name, value in narrow.items() if name != "layers.wq_scale"})
    with pytest.raises(ValueError, match="w_up has shape"):
        Llama.from_params(TINY, narrow | {"layers.w_up": params["layers.w_up"]})


def test_a_gpu_multiplies_eight_bit_numbers_and_a_cpu_wider_ones():
    def layer(x, weight, scale):
        return fp8.product(fp8.rows_of(x), weight, scale)

    shapes = ((128, 64), jnp.bfloat16), ((32, 64), fp8.DTYPE), ((32,), jnp.float32)
    traced = jax.jit(layer).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    products = {}
    for platform in ("cuda", "cpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        (products[platform],) = (line for line in text.splitlines() if "dot_general" in line)
    assert "(tensor<128x64xf8E4M3FN>, tensor<32x64xf8E4M3FN>) -> tensor<128x32xbf16>" in products["cuda"]
    assert "(tensor<128x64xf32>, tensor<32x64xf32>)" in products["cpu"]
