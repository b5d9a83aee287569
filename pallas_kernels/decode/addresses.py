"""What Triton kernels can address of stacked arrays, and a layer alone where that is not all of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def wraps(dtype: Any, size: int) -> bool:
    """Whether offsets overflow: Pallas's Triton lowering counts bytes, and has signed 32 bits for up to 2**32."""
    return jnp.dtype(dtype).itemsize == 1 and 2**31 < size <= 2**32


def addressable(layer: Int[Array, ""], *stacks: Array | None) -> tuple[Int[Array, ""], list[Any]]:
    """A layer's number and stacked arrays `[layers, …]` that kernels can address: those given, or else copies of the
    layer alone, and its number in them.

    A copy moves three bytes for one; only stacks of one-byte numbers of 2 to 4 GiB need it.
    """
    if not any(x is not None and wraps(x.dtype, x.size) for x in stacks):
        return layer, list(stacks)
    alone = [x if x is None else jax.lax.dynamic_index_in_dim(x, jnp.clip(layer, 0, x.shape[0] - 1)) for x in stacks]
    return jnp.int32(0), alone
