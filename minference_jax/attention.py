"""Sparse attention by pattern: index, plan and kernel under one jit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from minference_jax.index.build import make_plan as make_plan
from minference_jax.index.recall import estimated_recall
from minference_jax.patterns import DENSE, Pattern, PatternArrays, PlanBuilder, head_arrays
from pallas_kernels.backends import Implementation, choose_implementation, find_backend
from pallas_kernels.checks import check_lengths, check_q_offset, check_qkv, check_scale
from pallas_kernels.plan import kv_limit


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["density", "recall"],
    meta_fields=["implementation", "reason"],
)
@dataclasses.dataclass(frozen=True)
class AttentionInfo:
    """What a call of `sparse_attention` did.

    - `density`: float32 `[b, n]`, visited / causal cells. `recall`: float32 `[b, n]`, the estimated share of the
      dense softmax mass inside the plan, from 64 probe rows.
    - `implementation`, `reason` (static): what served the call, and why.
    """

    density: Float[Array, "b n"]
    recall: Float[Array, "b n"]
    implementation: str
    reason: str


def sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    pattern: Pattern | Sequence[Pattern] | PatternArrays | PlanBuilder,
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: Implementation | None = None,
    return_info: bool = False,
) -> Any:
    """Causal attention in which each head visits only the keys that its pattern names for this prompt.

    **Arguments:**

    - `q`: `[b, t, n, h]`; `k`, `v`: `[b, s, k, h]`, after position embedding; n a multiple of k.
    - `pattern`: as `make_plan`. Static, except for the leaves of `PatternArrays` and plan builders.
    - `lengths`: int32 `[b]` (right padding). `q_offset`: int32 scalar, may be traced; a multiple of 128.
    - `scale`, `implementation`, `return_info`: static. `implementation` as in `pallas_kernels.sparse_attention`.

    **Returns:** `[b, t, n, h]` in q's dtype, zero at rows at or past a sequence's length; with `return_info` also an
    `AttentionInfo`.

    Where the budgets of all heads cover all s keys, this is dense attention and served as such.

    **Raises:** ValueError and TypeError at trace time, naming the argument and the shapes.
    """
    check_qkv(q, k, v)
    check_lengths(lengths, q.shape[0])
    offset = check_q_offset(q_offset, q.shape[1], k.shape[1])
    heads = head_arrays(pattern, q.shape[2])
    out, info = _attend(q, k, v, heads, lengths, offset, check_scale(scale, q), implementation, return_info)
    return (out, info) if return_info else out


@partial(jax.jit, static_argnames=("scale", "implementation", "return_info"))
def _attend(
    q: Array,
    k: Array,
    v: Array,
    heads: PatternArrays | PlanBuilder,
    lengths: Array | None,
    q_offset: Array,
    scale: float,
    implementation: Any,
    return_info: bool,
) -> tuple[Array, AttentionInfo | None]:
    b, n = q.shape[0], q.shape[2]
    where: dict[str, Any] = {"lengths": lengths, "q_offset": q_offset, "scale": scale}
    everything = jnp.ones((b, n), jnp.float32)
    keeps_to_plans = implementation is not None and find_backend(implementation).keeps_to_plans
    dense_name = None if keeps_to_plans else implementation
    if heads.limits.covers >= k.shape[1] and not keeps_to_plans:
        choice = choose_implementation(q, k, v, None, implementation=dense_name)
        out: Any = pallas_kernels.dense_attention(q, k, v, implementation=dense_name, **where)
        reason = f"the budgets cover all {k.shape[1]} keys: dense attention; {choice.reason}"
        return out, AttentionInfo(everything, everything, choice.name, reason) if return_info else None

    def sparse() -> tuple[Any, Array, Array]:
        plan = make_plan(q, k, heads, **where)
        out: Any = pallas_kernels.sparse_attention(q, k, v, plan, implementation=implementation, **where)
        if not return_info:
            return out, everything, everything
        density = plan.density(q.shape[1], k.shape[1], q_offset=q_offset, lengths=lengths)
        limit = kv_limit(lengths, b, k.shape[1])
        held = estimated_recall(q, k, plan, lengths=limit, q_offset=q_offset, scale=scale)
        return out, density, held

    def dense() -> tuple[Any, Array, Array]:
        out: Any = pallas_kernels.dense_attention(q, k, v, implementation=dense_name, **where)
        return out, everything, everything

    if isinstance(heads, PatternArrays) and DENSE in heads.limits.kinds:
        # One scanned program serves all layers; those without a sparse head skip the index.
        out, density, held = jax.lax.cond(jnp.all(heads.kind == DENSE), dense, sparse)
    else:
        out, density, held = sparse()
    if not return_info:
        return out, None
    plan_shape = jax.eval_shape(lambda: make_plan(q, k, heads, **where))
    choice = choose_implementation(q, k, v, plan_shape, implementation=implementation)
    return out, AttentionInfo(density, held, choice.name, choice.reason)
