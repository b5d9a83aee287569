"""Test-wide settings: strict dtype promotion, two CPU devices, full-precision matrix products. Warnings are errors."""

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
