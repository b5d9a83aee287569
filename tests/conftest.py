"""Test-wide settings: strict dtype promotion, two CPU devices, full-precision matrix products. Warnings are errors.

Programs are compiled without most optimizations, here and in child processes: tests run small ones once or twice, and
compiling them takes most of the time. Tests that compute for long ask for the fixture `optimized`.
"""

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "float32")


@pytest.fixture
def rng():
    """A NumPy generator with a fixed seed, new for each test."""
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch):
    """Commands that a test calls leave the user's cache of compiled programs alone."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


@pytest.fixture
def optimized(monkeypatch):
    """Programs compiled as users have them, for the test that asks for this and its child processes."""
    before = jax.config.read("jax_disable_most_optimizations")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
