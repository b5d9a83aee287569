"""Eight-bit floats that are only moved: as bytes on a CPU, and the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode.narrow import moved


def put(x, rows):
    return jax.lax.dynamic_update_slice(x, rows, (1, 0))


def test_rows_of_any_dtype_are_put_in_place():
    for dtype in (jnp.float8_e4m3fn, jnp.int8, jnp.bfloat16):
        x, rows = jnp.asarray([[1, 2], [3, 4], [5, 6]], dtype), jnp.asarray([[-7, 8]], dtype)
        got = jax.jit(lambda x, rows: moved(put, x, rows))(x, rows)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.astype(jnp.float32), [[1, 2], [-7, 8], [5, 6]])


def test_a_cpu_converts_nothing():
    x, rows = (jnp.zeros(shape, jnp.float8_e4m3fn) for shape in ((3, 2), (1, 2)))
    compiled = jax.jit(lambda x, rows: moved(put, x, rows), donate_argnums=0).lower(x, rows).compile().as_text()
    assert compiled and "f16" not in compiled and " convert(" not in compiled
