"""A few rows times one layer of stacked weights: the kernel (interpreted) against a slice and a product."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from pallas_kernels.matvec import stacked_matvec


@pytest.mark.parametrize("shape", [(1, 64, 128), (3, 320, 256)])
def test_it_is_the_product_with_that_layer(rng, shape):
    b, inside, out = shape
    x = jnp.asarray(rng.standard_normal((b, inside)), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal((3, inside, out)), jnp.bfloat16)
    for layer in (0, 2):
        got = stacked_matvec(x, weight, jnp.int32(layer), interpret=True)
        expected = np.asarray(x.astype(jnp.float32)) @ np.asarray(weight[layer].astype(jnp.float32))
        assert got.dtype == jnp.bfloat16 and relative_error(got, expected) < 3e-3


def test_what_it_cannot_serve_it_refuses():
    x, weight = jnp.zeros((1, 64), jnp.bfloat16), jnp.zeros((2, 64, 128), jnp.bfloat16)
    for other in (x.astype(jnp.float32), jnp.zeros((17, 64), jnp.bfloat16), jnp.zeros((1, 65), jnp.bfloat16)):
        with pytest.raises(ValueError, match="stacked_matvec"):
            stacked_matvec(other, weight, jnp.int32(0))
    with pytest.raises(ValueError, match="multiples of 64 and 128"):
        stacked_matvec(x, weight[..., :100], jnp.int32(0))
