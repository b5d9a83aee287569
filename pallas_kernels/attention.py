"""Attention over a plan, dense causal attention, and the three patterns as functions of their own."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.backends import DenseImplementation, Implementation, choose_implementation
from pallas_kernels.checks import check_lengths, check_positions, check_q_offset, check_qkv, check_scale
from pallas_kernels.plan import SparsePlan
from pallas_kernels.plan_builders import a_shape_plan, block_sparse_plan, vertical_slash_plan
from pallas_kernels.tracing import under_own_settings

# [b, t, n, h], or with return_lse=True the pair ([b, t, n, h], float32 [b, t, n]).
Output = Any


@under_own_settings
def sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan,
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: Implementation | None = None,
    return_lse: bool = False,
) -> Output:
    """Causal attention over the keys that `plan` names: softmax(scale · q kᵀ, masked by `plan.to_mask`) v.

    **Arguments:**

    - `q`: `[b, t, n, h]`; `k`, `v`: `[b, s, k, h]`, one floating dtype. n is a multiple of k: query head j reads KV
      head j // (n / k). Query row r has position `q_offset` + r; keys run from position 0, so s >= q_offset + t.
    - `plan`: int32 arrays for these b, n and t (see `SparsePlan`).
    - `lengths`: int32 `[b]`, keys of each sequence (right padding); clamped to [0, s]. Default: all s.
    - `q_offset`: int32 scalar, may be traced; a multiple of 128 (a traced one is rounded down to it).
    - `scale` (static): multiplies the scores, by default 1/sqrt(h).
    - `implementation` (static): None (the best for this call), "hopper", "xla" or "reference".
    - `return_lse` (static): also return the log-sum-exp of the scores.

    **Returns:** `[b, t, n, h]` in q's dtype; with `return_lse` also float32 `[b, t, n]`, natural logarithm. Rows at
    or past a sequence's length are zero (LSE −inf).

    **Raises:** TypeError and ValueError at trace time, naming the argument and the shapes. Nothing that depends on
    data raises: the plan's rules say what is ignored.

    Works under jit, vmap, lax.scan, shard_map and jax.checkpoint, and whatever JAX's settings are. Reverse-mode
    differentiable in q, k and v, with every implementation but "cudnn" for dense attention; forward mode is refused by
    JAX. Arrays of 64 bits are no attention's: float64 is refused.
    """
    check_qkv(q, k, v)
    plan.validate(q.shape[0], q.shape[2], q.shape[1])
    arguments: dict[str, Any] = {
        "lengths": check_lengths(lengths, q.shape[0], k.shape[1]),
        "q_offset": check_q_offset(q_offset, q.shape[1], k.shape[1]),
        "scale": check_scale(scale, q),
    }
    choice = choose_implementation(q, k, v, plan, implementation=implementation)
    out, lse = choice.backend.attend(q, k, v, plan, **arguments, return_lse=return_lse)
    return (out, lse) if return_lse else out


@under_own_settings
def dense_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: DenseImplementation | None = None,
    return_lse: bool = False,
) -> Output:
    """Causal attention over every key: what the sparse functions are compared with, and their choice for short prompts.

    Arguments, results and errors as `sparse_attention`, without a plan. `implementation` (static): None (the best for
    this call), "cudnn" (a GPU's fused kernel; its log-sum-exp carries q's precision only), "hopper" (our kernel, with
    every key tile), "xla" (blockwise jnp) or "reference".
    """
    check_qkv(q, k, v)
    arguments: dict[str, Any] = {
        "lengths": check_lengths(lengths, q.shape[0], k.shape[1]),
        "q_offset": check_q_offset(q_offset, q.shape[1], k.shape[1]),
        "scale": check_scale(scale, q),
    }
    choice = choose_implementation(q, k, v, None, implementation=implementation)
    out, lse = choice.backend.attend(q, k, v, None, **arguments, return_lse=return_lse)
    return (out, lse) if return_lse else out


@under_own_settings
def a_shape_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    sink: int,
    window: int,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: Implementation | None = None,
    return_lse: bool = False,
) -> Output:
    """A-shape attention: every query sees the first `sink` keys and its last `window` keys (StreamingLLM's mask).

    **Arguments:** `sink` >= 0, `window` >= 0 (static), in keys; the window counts the query's own key and is rounded
    out to 64-key tiles. A sink longer than the sequence is cut to it. The rest, results and errors: `sparse_attention`.

    Source: MInference (arXiv 2407.02490) §3.2; official `streaming_forward(n_init, n_local)`.
    """
    check_qkv(q, k, v)
    s = k.shape[1]
    plan = a_shape_plan(q.shape[0], q.shape[2], sink=min(sink, s), window=min(window, s))
    return sparse_attention(
        q,
        k,
        v,
        plan,
        lengths=lengths,
        q_offset=q_offset,
        scale=scale,
        implementation=implementation,
        return_lse=return_lse,
    )


@under_own_settings
def vertical_slash_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    columns: Int[Array, "b n C"],
    slashes: Int[Array, "b n S"],
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: Implementation | None = None,
    return_lse: bool = False,
) -> Output:
    """Vertical-slash attention: every query sees the listed key columns and the keys at the listed distances.

    **Arguments:** `columns`: int32 `[b, n, C]` key positions; `slashes`: int32 `[b, n, S]` query-key distances; any
    order; negative (by custom -1), repeated and out-of-range entries are ignored. Columns are exact; slash lines are
    rounded out to 64-key tiles; the diagonal is always visited. The rest, results and errors: `sparse_attention`.

    Source: MInference (arXiv 2407.02490) §3.2, Algorithm 2; official `vertical_slash_sparse_attention`.
    """
    check_qkv(q, k, v)
    check_positions("columns", columns, q.shape[0], q.shape[2], 3)
    check_positions("slashes", slashes, q.shape[0], q.shape[2], 3)
    plan = vertical_slash_plan(columns, slashes, kv_len=k.shape[1])
    return sparse_attention(
        q,
        k,
        v,
        plan,
        lengths=lengths,
        q_offset=q_offset,
        scale=scale,
        implementation=implementation,
        return_lse=return_lse,
    )


@under_own_settings
def block_sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    blocks: Int[Array, "b n i M"],
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: Implementation | None = None,
    return_lse: bool = False,
) -> Output:
    """Block-sparse attention: every tile of 128 queries sees its diagonal and the listed 64-key tiles.

    **Arguments:** `blocks`: int32 `[b, n, i, M]` key-tile numbers (key position // 64) for each query tile, any order;
    -1 for none; repeated and out-of-range entries are ignored. The rest, results and errors: `sparse_attention`.

    Source: MInference (arXiv 2407.02490) §3.2, Algorithm 3; official `block_sparse_attention` (64-query rows).
    """
    check_qkv(q, k, v)
    check_positions("blocks", blocks, q.shape[0], q.shape[2], 4)
    return sparse_attention(
        q, k, v, block_sparse_plan(blocks), lengths=lengths, q_offset=q_offset, scale=scale,
        implementation=implementation, return_lse=return_lse,
    )  # fmt: skip
