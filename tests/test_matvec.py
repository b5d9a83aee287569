"""A few rows times one layer of stacked weights: the kernel (interpreted) against a slice and a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from minference_jax.models import fp8
from pallas_kernels.decode.matvec import stacked_matvec

MATVEC = jax.jit(stacked_matvec, static_argnames=("activation", "dtype", "interpret"))
QUANTIZE = jax.jit(fp8.quantize_weight, static_argnums=1)


@pytest.mark.parametrize("shape", [(1, 64, (128,)), (3, 320, (256, 128))])
def test_it_is_the_product_with_that_layer(rng, shape):
    b, inside, outs = shape
    x = jnp.asarray(rng.standard_normal((b, inside)), jnp.bfloat16)
    weights = [jnp.asarray(rng.standard_normal((3, inside, out)), jnp.bfloat16) for out in outs]
    for layer in (0, 2):
        got = MATVEC(x, weights, jnp.int32(layer), interpret=True)
        for y, weight in zip(got, weights, strict=True):
            expected = np.asarray(x.astype(jnp.float32)) @ np.asarray(weight[layer].astype(jnp.float32))
            assert y.dtype == jnp.bfloat16 and relative_error(y, expected) < 3e-3


@pytest.mark.parametrize(("b", "dtype"), [(1, jnp.float16), (3, jnp.bfloat16)])
def test_fp8_weights_are_read_as_they_lie_and_x_is_not_rounded(rng, b, dtype):
    # Rows of very different sizes, as residual streams have, one of them of zeros.
    inside = 256 if b == 1 else 320  # a multiple of the larger tile, and of the smaller one only
    x = jnp.asarray(rng.standard_normal((b, inside)) * np.array([[1e4], [1e-6], [0]])[:b], dtype)
    wide = [jnp.asarray(rng.standard_normal((2, inside, out)), jnp.bfloat16) for out in (128, 64)]
    weights, scales = zip(*(QUANTIZE(weight, 1) for weight in wide), strict=True)
    got = MATVEC(x, weights, jnp.int32(1), scales, dtype=jnp.float32, interpret=True)
    for y, weight, scale in zip(got, weights, scales, strict=True):
        exact = weight[1].astype(jnp.float32) * scale[1][:, None]
        for row, expected in zip(y, np.asarray(x.astype(jnp.float32)) @ np.asarray(exact).T, strict=True):
            np.testing.assert_allclose(row, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_activation_is_part_of_it(rng, narrow, activation):
    row = jnp.asarray(rng.standard_normal((1, 192)), jnp.bfloat16)
    weights = [jnp.asarray(rng.standard_normal((2, 192, 64)) / 14, jnp.bfloat16) for _ in range(2)]
    scales, exact = (), [np.asarray(weight[1].astype(jnp.float32)) for weight in weights]
    if narrow:
        weights, scales = zip(*(QUANTIZE(weight, 1) for weight in weights), strict=True)
        exact = [np.asarray(w[1].astype(jnp.float32) * s[1][:, None]).T for w, s in zip(weights, scales, strict=True)]
    gate, up = (np.asarray(row.astype(jnp.float32)) @ weight for weight in exact)
    act = jax.nn.silu if activation == "silu" else jax.nn.gelu
    options = {"activation": activation, "dtype": jnp.float32, "interpret": True}
    (y,) = MATVEC(row, weights, jnp.int32(1), scales, **options)
    assert y.dtype == jnp.float32 and relative_error(y, act(gate) * up) < 1e-3


def test_every_number_of_e4m3_is_exact():
    numbers = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    weight, scale = jnp.asarray(np.broadcast_to(numbers[None, :, None], (2, 256, 64))), jnp.ones((2, 256), jnp.float32)
    row = jnp.zeros((1, 64), jnp.bfloat16).at[0, 3].set(1)
    (y,) = MATVEC(row, [weight], jnp.int32(1), [scale], dtype=jnp.float32, interpret=True)
    np.testing.assert_array_equal(y[0], numbers.astype(np.float32))  # NaN too


@pytest.mark.parametrize(("layers", "sliced"), [(29, False), (40, True), (60, False)])
def test_weights_that_the_lowering_cannot_address_are_copied_a_layer_at_a_time(layers, sliced):
    # Up to 2**31 bytes offsets fit 32 bits; from 2**32 on they have 64.
    shapes = ((1, 5120), jnp.bfloat16), ((layers, 14336, 5120), jnp.float8_e4m3fn), ((layers, 14336), jnp.float32)
    row, weight, scale = (jax.ShapeDtypeStruct(*shape) for shape in shapes)

    def multiply(row, weight, scale):
        return stacked_matvec(row, [weight], jnp.int32(3), [scale], interpret=True)

    text = str(jax.make_jaxpr(multiply)(row, weight, scale))
    assert ("f8_e4m3fn[1,14336,5120] = dynamic_slice" in text) == sliced


@pytest.mark.usefixtures("unchecked")
def test_what_it_cannot_serve_it_refuses():
    x, weight = jnp.zeros((1, 64), jnp.bfloat16), jnp.zeros((2, 64, 128), jnp.bfloat16)
    for other in (x.astype(jnp.float32), jnp.zeros((17, 64), jnp.bfloat16), x[:0], jnp.zeros((1, 65), jnp.bfloat16)):
        with pytest.raises(ValueError, match="stacked_matvec"):
            stacked_matvec(other, [weight], jnp.int32(0))
    with pytest.raises(ValueError, match="two weights of one width"):
        stacked_matvec(x, [weight], jnp.int32(0), activation="silu")
    with pytest.raises(ValueError, match="multiples of 64"):
        stacked_matvec(x, [weight[..., :100]], jnp.int32(0))
    with pytest.raises(ValueError, match="with scales it is float8_e4m3fn"):
        stacked_matvec(x, [weight.swapaxes(1, 2)], jnp.int32(0), [jnp.ones((2, 128))])
    with pytest.raises(ValueError, match="not one for each output"):
        narrow = jnp.zeros((2, 128, 128), jnp.float8_e4m3fn)
        stacked_matvec(jnp.zeros((1, 128), jnp.bfloat16), [narrow], jnp.int32(0), [jnp.ones((2, 64))])
