"""What every test file shares: tolerances (each with its reason), random inputs, and the command line."""

import jax.numpy as jnp
import numpy as np

from minference_jax.cli import main, progress

progress.FIRST_LINE = 3600.0  # no line of progress among what a command says, however slow the machine

# Largest allowed |difference| from the float32 oracle.
# float32: one softmax row sums up to a few thousand terms in another order. Scores reach 50 in a case of scale 1; each
# is rounded by 2e-6, its sum of 128 products by more, and weights are their exponentials.
# bfloat16 / float16: outputs are averages of unit normals, rounded once on output (2^-9 / 2^-12 relative) and
# once where probabilities are rounded before the second matrix product.
ATOL = {jnp.dtype("float32"): 3e-5, jnp.dtype("bfloat16"): 2e-2, jnp.dtype("float16"): 4e-3}

# ||difference|| / ||oracle||: rounding noise averages out over the array, so this bound is much tighter than ATOL.
RELATIVE = {jnp.dtype("float32"): 1e-5, jnp.dtype("bfloat16"): 5e-3, jnp.dtype("float16"): 1e-3}


def relative_error(actual, expected) -> float:
    """Frobenius norm of the difference over that of `expected`, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def assert_close(actual, expected, dtype=None) -> None:
    """Within the tolerances of `dtype` (default: that of `actual`), with no NaN."""
    dtype = jnp.dtype(dtype or actual.dtype)
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, atol=ATOL[dtype], rtol=ATOL[dtype])
    assert relative_error(actual, expected) <= RELATIVE[dtype]


def random_qkv(rng, b, t, s, n, k, h, dtype="float32"):
    """Standard-normal q [b, t, n, h], k and v [b, s, k, h]."""
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, h)))


def run_command(capsys, *arguments):
    """`minference-jax` with these arguments: exit status, standard output, standard error."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# Largest |difference| of a log-sum-exp, whose values are about 5: float32 sums of rounded 16-bit products.
LSE_ATOL = 1e-3

# Largest |difference| of a gradient in float32: sums over up to 430 rows of products of normals.
GRADIENT_ATOL = 1e-4


def assert_lse_close(actual, expected) -> None:
    """Within `LSE_ATOL`, and −inf in the same places."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(actual[finite], expected[finite], atol=LSE_ATOL, rtol=0)
