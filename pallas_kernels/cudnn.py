"""Dense causal attention by cuDNN's fused kernel, which JAX brings: it visits every key and takes no plan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Device
from pallas_kernels.plan import SparsePlan, kv_limit


def unsupported_reason(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan | None,
    *,
    device: Device | None,
) -> str | None:
    """Why cuDNN cannot serve a call, in words for the caller; None if it can. See `backends.UnsupportedReason`.

    It needs a GPU that is here, 16-bit inputs, a head_dim that is a multiple of 8 up to 128, and as many queries as
    keys.
    """
    if plan is not None:
        return "cuDNN attention visits every key and takes no plan"
    if device is not None and (reason := device.reason_against("cuDNN")) is not None:
        return reason
    if device is not None and device.version < (8, 0):
        return f"cuDNN attention needs compute capability 8.0 or later; the default device has {device.capability}"
    if device is not None and not device.here:
        return "cuDNN attention is traced where its GPU is: JAX asks cuDNN for its version"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention computes in bfloat16 or float16; q is {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"cuDNN attention needs head_dim % 8 == 0 and <= 128, got {q.shape[-1]}"
    if q.shape[1] != k.shape[1]:
        return "cuDNN's causal mask cannot start at an offset, and q has fewer positions than k"
    return None


def remark(device: Device) -> str:
    """Why cuDNN was chosen."""
    return "a GPU is present"


def attend(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan | None,
    *,
    lengths: Int[Array, " b"] | None,
    q_offset: Int[Array, ""],
    scale: float,
    return_lse: bool,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Dense causal attention. See `backends.Attend`; the log-sum-exp carries q's precision only.

    q and k have one length here, so q_offset is 0, and the causal mask alone keeps valid rows inside their sequence.
    """
    out, lse = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation="cudnn", return_residual=True
    )
    lse = lse.astype(jnp.float32)  # already rounded to q's dtype inside JAX
    if lengths is None:
        return out, lse
    valid = jnp.arange(q.shape[1]) < kv_limit(lengths, q.shape[0], k.shape[1])[:, None]
    return (
        lax.select(jnp.broadcast_to(valid[..., None, None], out.shape), out, jnp.zeros_like(out)),
        jnp.where(valid[..., None], lse, -jnp.inf),
    )
