"""Probabilities of one step, a few columns at a time: what is rounded and added up gives its registers free."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper.registers import SUM_COLUMNS, folded
from pallas_kernels.mma.product import LAYOUT


def probabilities(
    s: Float[Array, "m s"],
    m: Float[Array, " m"],
    total: Float[Array, "m SUM_COLUMNS"],
    scale: float,
    dtype: Any,
    *,
    emulate: bool,
) -> tuple[Float[Array, "m s"], Float[Array, "m SUM_COLUMNS"]]:
    """2**(s · scale - m) in a 16-bit dtype, and the running sums with theirs (before they are rounded)."""
    if emulate:
        p = jnp.exp2(s * scale - lax.broadcast_in_dim(m, s.shape, [0]))
        return p.astype(dtype), total + folded(p, emulate=True)
    result = plgpu.ShapeDtypeStruct(s.shape, dtype, layout=LAYOUT)
    sums = plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(LAYOUT, LAYOUT.reduce(1), LAYOUT), return_type=(result, sums))
    def softmax(_, s, m, total):
        to = mgpu.utils.dtype_to_ir_type(dtype)
        wide = m.broadcast_in_dim(total.shape, (0,), total.layout)
        rounded = []
        for column in range(0, s.shape[1], SUM_COLUMNS):
            part = (s[:, column : column + SUM_COLUMNS] * scale - wide).exp2(approx=True)
            total = total + part
            rounded.append(part.astype(to))
        return mgpu.FragmentedArray(
            _registers=np.concatenate([x.registers for x in rounded], axis=1), _layout=s.layout, _is_signed=None
        ), total

    return softmax(s, m, total)  # pyright: ignore[reportCallIssue]
