"""Attention over a plan, and dense causal attention: arguments are checked, and a backend serves the call."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

from jaxtyping import Array, Float, Int

from pallas_kernels.backends import DenseImplementation, Implementation, choose_implementation, find_backend
from pallas_kernels.checks import check_lengths, check_q_offset, check_qkv, check_scale
from pallas_kernels.plan import SparsePlan
from pallas_kernels.spread import KV_AXES, PER_HEAD, PER_SEQUENCE, Q_AXES, WHOLE, by_device
from pallas_kernels.tracing import under_own_settings

Output = Float[Array, "b t n h"]
OutputAndLse = tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]


class Where(TypedDict, total=False):
    """Which keys there are, where the queries stand among them, and how scores are scaled. See `sparse_attention`."""

    lengths: Int[Array, " b"] | None
    q_offset: int | Int[Array, ""]
    scale: float | None


class Options(Where, total=False):
    """The keyword arguments that `sparse_attention` and the three pattern functions share. See `sparse_attention`."""

    implementation: Implementation | None


class DenseOptions(Where, total=False):
    """The keyword arguments of `dense_attention`."""

    implementation: DenseImplementation | None


@overload
def sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Output: ...
@overload
def sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> OutputAndLse: ...
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
) -> Output | OutputAndLse:
    """Causal attention over the keys that `plan` names: softmax(scale · q kᵀ, masked by `plan.to_mask`) v.

    **Arguments:**

    - `q`: `[b, t, n, h]`; `k`, `v`: `[b, s, k, h]`, one floating dtype. n is a multiple of k: query head j reads KV
      head j // (n / k). Query row r has position `q_offset` + r; keys run from position 0, so s >= q_offset + t.
    - `plan`: int32 arrays for these b, n and t (see `SparsePlan`).
    - `lengths`: int32 `[b]`, keys of each sequence (right padding); clamped to [0, s]. Default: all s.
    - `q_offset`: int32 scalar, may be traced; a multiple of 128 (a traced one is rounded down to it).
    - `scale` (static): multiplies the scores, by default 1/sqrt(h).
    - `implementation` (static): the name of a backend, "hopper", "mma", "xla" or "reference"; or None, the best for
      this call on the default device, or on that of `lowering_for` (`choose_implementation` says which and why).
    - `return_lse` (static): also return the log-sum-exp of the scores.

    **Returns:** `[b, t, n, h]` in q's dtype; with `return_lse` the pair of that and float32 `[b, t, n]`, natural
    logarithm. Rows at or past a sequence's length are zero (LSE −inf).

    **Raises:** TypeError and ValueError at trace time, naming the argument and the shapes. Nothing that depends on
    data raises: the plan's rules say what is ignored.

    Works under jit, vmap, lax.scan, shard_map and jax.checkpoint, and whatever JAX's settings are. Arrays that are
    spread over devices by sequences or heads stay so, on Auto and Explicit axes of a mesh: each device works on its own
    ones, and the output lies where q does; what is spread over positions is gathered first. Reverse-mode
    differentiable in q, k and v, with every implementation but "cudnn" for dense attention; forward mode is refused by
    JAX. Arrays of 64 bits are no attention's: float64 is refused.

    Padding rows of k and v may hold anything, NaN included. A NaN or infinity of a key or value inside a sequence
    spoils the rows that see it. No row of an earlier query tile changes; an earlier row of the same 128 does where a
    kernel ("hopper", "mma") meets it in v, for tensor cores multiply it with that row's weight of zero. With "xla" and
    "reference" no earlier row changes at all. Under `jax_debug_nans` such a call raises.

    Source: MInference (arXiv 2407.02490) §3.2.
    """
    check_qkv(q, k, v)
    if not isinstance(plan, SparsePlan):
        raise TypeError(f"plan must be a SparsePlan, got {type(plan).__name__}; dense_attention takes none")
    plan.validate(q.shape[0], q.shape[2], q.shape[1])
    return _attend(q, k, v, plan, lengths, q_offset, scale, implementation, return_lse)


@overload
def dense_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[DenseOptions],
) -> Output: ...
@overload
def dense_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    return_lse: Literal[True],
    **options: Unpack[DenseOptions],
) -> OutputAndLse: ...
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
) -> Output | OutputAndLse:
    """Causal attention over every key: what the sparse functions are compared with, and their choice for short prompts.

    **Arguments:** as `sparse_attention`, without a plan. `implementation` (static): None, the best for this call;
    "cudnn", a GPU's fused kernel, whose log-sum-exp has q's precision only and which wants finite padding; "hopper" and
    "mma", our kernels with every key tile; "xla", blockwise jnp; or "reference".

    **Returns, raises:** as `sparse_attention`.
    """
    check_qkv(q, k, v)
    return _attend(q, k, v, None, lengths, q_offset, scale, implementation, return_lse)


def _attend(
    q: Array,
    k: Array,
    v: Array,
    plan: SparsePlan | None,
    lengths: Array | None,
    q_offset: int | Array,
    scale: float | None,
    implementation: DenseImplementation | None,
    return_lse: bool,
) -> Any:
    """The rest of the checks, then the backend that serves the call."""
    lengths = check_lengths(lengths, q.shape[0], k.shape[1])
    offset = check_q_offset(q_offset, q.shape[1], k.shape[1])
    scale = check_scale(scale, q)
    choice = choose_implementation(q, k, v, plan, implementation=implementation)
    options = {"name": choice.name, "scale": scale, "return_lse": return_lse}
    arrays = (q, k, v, plan, lengths, offset)
    axes = (Q_AXES, KV_AXES, KV_AXES, PER_HEAD, PER_SEQUENCE, WHOLE)
    out, lse = by_device(_serve, arrays, axes, (Q_AXES, Q_AXES), **options)
    return (out, lse) if return_lse else out


def _serve(
    q: Array,
    k: Array,
    v: Array,
    plan: SparsePlan | None,
    lengths: Array | None,
    q_offset: Array,
    *,
    name: str,
    scale: float,
    return_lse: bool,
) -> tuple[Array, Array | None]:
    return find_backend(name).attend(
        q, k, v, plan, lengths=lengths, q_offset=q_offset, scale=scale, return_lse=return_lse
    )
