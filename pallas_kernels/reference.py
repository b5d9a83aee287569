"""The oracle: attention under the dense mask of a plan, in float32. Every other implementation is tested against it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Device
from pallas_kernels.plan import SparsePlan
from pallas_kernels.plan_builders import full_plan


@partial(jax.jit, static_argnames="scale")
def reference_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan,
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """softmax(q kᵀ · scale over the keys of `plan.to_mask`) v, and its log-sum-exp.

    **Returns:** the output in q's dtype and float32 LSE (natural logarithm). Rows that see no key give zeros and −inf.

    Memory: several float32 arrays `[b, n, t, s]`. For tests only.
    """
    b, t, n, h = q.shape
    factor = h**-0.5 if scale is None else scale
    s, group = k.shape[1], n // k.shape[2]
    mask = plan.to_mask(t, s, q_offset=q_offset, lengths=lengths)
    mask = jnp.broadcast_to(mask, (b, n, t, s)).reshape(b, n // group, group, t, s)
    queries = q.astype(jnp.float32).reshape(b, t, n // group, group, h)
    precision = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btkgh,bskh->bkgts", queries, k.astype(jnp.float32), precision=precision) * factor
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, jnp.float32(0))
    weights = jnp.where(mask, jnp.exp(scores - top), jnp.float32(0))
    total = weights.sum(-1, keepdims=True)
    divisor = jnp.where(total > 0, total, jnp.float32(1))
    out = jnp.einsum("bkgts,bskh->btkgh", weights / divisor, v.astype(jnp.float32), precision=precision)
    lse = jnp.where(total > 0, top + jnp.log(divisor), -jnp.inf)[..., 0]
    return out.reshape(b, t, n, h).astype(q.dtype), lse.reshape(b, n, t).swapaxes(1, 2)


def unsupported_reason(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan | None,
    *,
    device: Device | None,
) -> None:
    """None: the oracle serves every call, memory permitting. See `backends.UnsupportedReason`."""


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
    """`reference_attention`, as `backends.Attend` wants it."""
    plan = full_plan(q.shape[0], q.shape[2], k.shape[1]) if plan is None else plan
    return reference_attention(q, k, v, plan, lengths=lengths, q_offset=q_offset, scale=scale)
