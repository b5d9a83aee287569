"""Moving 8-bit floats about as the bytes that they are, where XLA would convert them first."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.device import target


def moved(move: Callable[..., Array], *arrays: Array) -> Array:
    """`move(*arrays)`, where `move` takes numbers from place to place and computes nothing of them.

    XLA's CPU backend has no 8-bit floats: to write one row of an array it turns the whole array into float16 and back.
    Where a CPU is the default device, 8-bit floats are moved as 8-bit integers, which gives the same.

    **Arguments:** `arrays`: of one dtype, any shapes.
    """
    dtype = arrays[0].dtype
    if dtype.itemsize > 1 or not jnp.issubdtype(dtype, jnp.floating) or target().platform != "cpu":
        return move(*arrays)
    codes = move(*(jax.lax.bitcast_convert_type(x, jnp.uint8) for x in arrays))
    return jax.lax.bitcast_convert_type(codes, dtype)
