"""Which implementation serves a call, and why."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
from jaxtyping import Array, Float

from pallas_kernels.hopper import attention as hopper
from pallas_kernels.hopper.assembler import ignores_setmaxnreg
from pallas_kernels.plan import SparsePlan

Implementation = Literal["hopper", "xla", "reference"]
DenseImplementation = Literal["cudnn", "hopper", "xla", "reference"]


class Choice(NamedTuple):
    """The implementation that serves a call and the reason, in words for the caller."""

    name: str
    reason: str


def choose_implementation(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan,
    *,
    implementation: Implementation | None = None,
) -> Choice:
    """The implementation that `sparse_attention` uses for these arguments (shapes and dtypes only).

    **Raises:** ValueError when `implementation` is unknown, or names a kernel that cannot serve the call (with the
    reason). Forcing "hopper" skips the check of the present device, so that it can be lowered on a machine without one.
    """
    if implementation is None:
        reason = hopper.unsupported_reason(q, k, v, plan)
        if reason is not None:
            return Choice("xla", reason)
        slower = "; in a slower form than with jax 0.11: nvJitLink ignores setmaxnreg"
        return Choice("hopper", "a Hopper GPU is present" + (slower if ignores_setmaxnreg() else ""))
    if implementation == "hopper":
        reason = hopper.unsupported_reason(q, k, v, plan, platform_check=False)
        if reason is not None:
            raise ValueError(f'implementation="hopper" cannot serve this call: {reason}')
    elif implementation not in ("xla", "reference"):
        raise ValueError(f'implementation must be None, "hopper", "xla" or "reference", got {implementation!r}')
    return Choice(implementation, "asked for")


def choose_dense_implementation(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    *,
    implementation: DenseImplementation | None = None,
) -> Choice:
    """The implementation that `dense_attention` uses.

    cuDNN needs a GPU, 16-bit inputs, head_dim % 8 == 0 up to 128, and as many queries as keys. Where there are fewer
    queries, the Hopper kernel serves the call with every key tile, if it can.

    **Raises:** ValueError when `implementation` is unknown or cannot serve the call (with the reason).
    """
    if implementation not in (None, "cudnn", "hopper", "xla", "reference"):
        known = '"cudnn", "hopper", "xla" or "reference"'
        raise ValueError(f"implementation must be None, {known}, got {implementation!r}")
    if implementation in ("xla", "reference"):
        return Choice(implementation, "asked for")
    if implementation == "hopper":
        return choose_implementation(q, k, k, SparsePlan(), implementation=implementation)
    reason = None
    if q.dtype not in (jax.numpy.bfloat16, jax.numpy.float16):
        reason = f"cuDNN attention computes in bfloat16 or float16; q is {q.dtype}"
    elif q.shape[-1] % 8 or q.shape[-1] > 128:
        reason = f"cuDNN attention needs head_dim % 8 == 0 and <= 128, got {q.shape[-1]}"
    elif q.shape[1] != k.shape[1]:
        reason = "cuDNN's causal mask cannot start at an offset, and q has fewer positions than k"
    if implementation == "cudnn":
        if reason is not None:
            raise ValueError(f'implementation="cudnn" cannot serve this call: {reason}')
        return Choice("cudnn", "asked for")
    if jax.default_backend() != "gpu":
        reason = f"the default device is {jax.default_backend()}, not a GPU"
    if reason is None:
        return Choice("cudnn", "a GPU is present")
    if q.shape[1] != k.shape[1] and hopper.unsupported_reason(q, k, k, SparsePlan()) is None:
        return Choice("hopper", f"{reason}; the Hopper kernel visits every key tile")
    return Choice("xla", reason)
