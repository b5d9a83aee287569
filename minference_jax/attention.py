"""Sparse attention by pattern: index → plan → kernel under one jit.

`make_plan` is a loop: for each family of patterns that occurs, its index makes a plan for all heads, and each head
takes the plan of its own family.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from minference_jax.index.recall import AXES as RECALL_AXES
from minference_jax.index.recall import estimated_recall
from minference_jax.keywords import LayerKeywords, check_layer_keywords, check_own_keys, in_dtype, naming_layer_keywords
from minference_jax.patterns.base import Pattern, Where
from minference_jax.patterns.heads import LayerPatterns, layer_patterns, patterns_of_heads
from minference_jax.patterns.rates import predicted
from minference_jax.zigzag import Zigzag
from pallas_kernels.backends import Implementation, choose_implementation, find_backend
from pallas_kernels.checks import check_lengths, check_q_offset, check_qkv, check_scale
from pallas_kernels.device import target
from pallas_kernels.plan import KEY_TILE, SparsePlan, kv_limit, num_query_tiles
from pallas_kernels.spread import KV_AXES, PER_HEAD, PER_SEQUENCE, Q_AXES, WHOLE, by_device
from pallas_kernels.tracing import under_own_settings, vary_alike


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
    - `implementation`, `reason` (static): what served the call, and why; and that dense attention would be faster, if
      it is predicted to be on this device.
    """

    density: Float[Array, "b n"]
    recall: Float[Array, "b n"]
    implementation: str
    reason: str


Patterns = Pattern | str | Sequence[Pattern | str] | LayerPatterns
"""One layer's patterns: one (or a plan builder, or a pattern's text) for all heads, one per head, or as arrays."""


@under_own_settings
def make_plan(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    pattern: Patterns,
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    axis_name: str | None = None,
) -> SparsePlan:
    """The online index: which keys each head's queries visit.

    **Arguments:**

    - `q`: `[b, t, n, h]`, after position embedding; `k`: `[b, s, k, h]`, same dtype; n a multiple of k.
    - `pattern`: one pattern, text or plan builder for all heads, one per head, or `LayerPatterns` with leaves `[n]`
      (budgets may then be traced; which families occur, and the widths, are static). A pattern may be an argument of
      a jitted function, which is compiled for each; a text may not, unless it is named in `static_argnames`.
    - `lengths`: int32 `[b]`, keys of each sequence (right padding), clamped to [0, s]; default all s.
    - `q_offset`: int32 scalar, position of the first query row, a multiple of 128; may be traced. In chunked prefill
      and follow-up turns each chunk is estimated from its own last rows, over the keys up to them.
    - `scale` (static): of the scores, by default 1/sqrt(h).
    - `axis_name` (static): inside `jax.shard_map`, the mesh axis over which a layer's heads are divided.

    **Returns:** a `SparsePlan` of static widths. A head's unused parts have count 0.

    **Raises:** ValueError for shapes that do not fit, TypeError for something that is no pattern.

    Works under jit, vmap, lax.scan over layers (with `LayerPatterns`) and shard_map over heads.
    """
    check_qkv(q, k, k)
    q, k = jax.lax.stop_gradient((q, k))  # a plan is integers
    lengths = check_lengths(lengths, q.shape[0], k.shape[1])
    offset = check_q_offset(q_offset, q.shape[1], k.shape[1])
    heads = layer_patterns(pattern, q.shape[2])
    arrays = (q, k, heads, kv_limit(lengths, q.shape[0], k.shape[1]), offset)
    if not heads.built:
        axes, results = (Q_AXES, KV_AXES, heads.axes(), PER_SEQUENCE, WHOLE), PER_HEAD
    elif axis_name is None:  # the index of a stranger has all heads
        axes, results = (PER_SEQUENCE, PER_SEQUENCE, heads.axes(), PER_SEQUENCE, WHOLE), PER_SEQUENCE
    else:
        raise ValueError(f"pattern: a plan builder sees all heads of a layer, which axis_name={axis_name!r} divides")
    return by_device(_plan, arrays, axes, results, scale=check_scale(scale, q), axis_name=axis_name)


@partial(jax.jit, static_argnames=("scale", "axis_name"))
def _plan(
    q: Array, k: Array, heads: LayerPatterns, lengths: Array, q_offset: Array, *, scale: float, axis_name: Any
) -> SparsePlan:
    q, k, heads, where = vary_alike((q, k, heads, Where(lengths, q_offset, scale, axis_name, heads.unspent)))
    plans = [(chosen, budgets.index(q, k, where)) for chosen, budgets in heads.chosen()]
    for _, plan in plans:
        plan.validate(q.shape[0], q.shape[2], q.shape[1])
    return _merged(plans, q.shape[0], q.shape[2], num_query_tiles(q.shape[1]))


def _merged(plans: list[tuple[Array | None, SparsePlan]], b: int, n: int, tiles: int) -> SparsePlan:
    """One plan in which each head has the parts of the plan that it takes, at common widths."""

    def part(name: str, count: str, *lead: int) -> tuple[Array | None, Array | None]:
        found = [(chosen, getattr(plan, name), getattr(plan, count)) for chosen, plan in plans]
        found = [(chosen, entries, counts) for chosen, entries, counts in found if entries is not None]
        if not found:
            return None, None
        width = max(entries.shape[-1] for _, entries, _ in found)
        merged, total = jnp.zeros((*lead, width), jnp.int32), jnp.zeros(lead, jnp.int32)
        for chosen, entries, counts in found:
            entries = jnp.pad(entries, [(0, 0)] * (entries.ndim - 1) + [(0, width - entries.shape[-1])])
            if chosen is None:  # of all heads
                return jnp.broadcast_to(entries, merged.shape), jnp.broadcast_to(counts, total.shape)
            own = chosen.reshape(n, *[1] * (len(lead) - 2))
            merged = jnp.where(own[..., None], entries, merged)
            total = jnp.where(own, counts, total)
        return merged, total

    return SparsePlan(
        *part("columns", "column_count", b, n),
        *part("bands", "band_count", b, n),
        *part("blocks", "block_count", b, n, tiles),
        band_multiple=math.gcd(*(plan.band_multiple for _, plan in plans if plan.bands is not None)) or KEY_TILE,
        clean=all(plan.clean for _, plan in plans),
    )


class Options(LayerKeywords, total=False):
    """The arguments of `sparse_attention` that say how, not what."""

    lengths: Int[Array, " b"] | None
    q_offset: int | Int[Array, ""]
    scale: float | None
    implementation: Implementation | None
    axis_name: str | None
    zigzag: Zigzag | None


@overload
def sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    pattern: Patterns,
    *,
    return_info: Literal[False] = False,
    **options: Unpack[Options],
) -> Array: ...
@overload
def sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    pattern: Patterns,
    *,
    return_info: Literal[True],
    **options: Unpack[Options],
) -> tuple[Array, AttentionInfo]: ...
@overload
def sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    pattern: Patterns,
    *,
    return_info: bool,
    **options: Unpack[Options],
) -> Any: ...
@overload
def sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    pattern: Patterns,
    *,
    return_lse: bool,
    return_info: bool = False,
    **options: Unpack[Options],
) -> Any: ...
@naming_layer_keywords
@under_own_settings
def sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    pattern: Patterns,
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: Implementation | None = None,
    return_lse: bool = False,
    return_info: bool = False,
    axis_name: str | None = None,
    zigzag: Zigzag | None = None,
    **layer: Unpack[LayerKeywords],
) -> Array | tuple[Array, AttentionInfo]:
    """Causal attention in which each head visits only the keys that its pattern names for this prompt.

    **Arguments:**

    - `q`: `[b, t, n, h]`; `k`, `v`: `[b, s, k, h]`, after position embedding; n a multiple of k.
    - `pattern`: as `make_plan`. Static, except for the leaves of `LayerPatterns` and plan builders.
    - `lengths`: int32 `[b]` (right padding). `q_offset`: int32 scalar, may be traced; a multiple of 128.
    - `scale`, `implementation`, `return_lse`, `return_info`: static. `implementation` as in
      `pallas_kernels.sparse_attention`.
    - `axis_name` (static): inside `jax.shard_map`, the mesh axis over which a layer's heads are divided.
    - `zigzag` (static): the devices that share these heads' query tiles: each is given all of q, makes the same plan,
      and returns `zigzag.own` of the output.
    - `layer`: what Flax's layers pass (`LayerKeywords`), so that `functools.partial(sparse_attention, pattern=...)` is
      an `attention_fn`. `is_causal=True` is what it does anyway. What would have to be left out is refused by name: a
      mask, a bias, dropout, weights to be kept, `is_causal=False`, cross-attention.

    **Returns:** `[b, t, n, h]` in q's dtype, zero at rows at or past a sequence's length; with `return_lse` also the
    log-sum-exp of the scores, float32 `[b, t, n]`; with `return_info` also an `AttentionInfo`; for
    `LayerPatterns` with `unspent` also, last, what is left of it, float32 `[b]`.

    Where the budgets of all heads cover all s keys, this is dense attention and served as such.

    **Raises:** ValueError and TypeError at trace time, naming the argument and the shapes.
    """
    check_layer_keywords(layer)
    q, k, v = in_dtype(q, k, v, layer)
    check_qkv(q, k, v)
    check_own_keys(q, k, layer)
    lengths = check_lengths(lengths, q.shape[0], k.shape[1])
    offset = check_q_offset(q_offset, q.shape[1], k.shape[1])
    heads = layer_patterns(pattern, q.shape[2])
    remark = _if_slower(pattern, q, k) if return_info and implementation is None else ""
    settings: Any = (check_scale(scale, q), implementation, return_lse, return_info, remark, axis_name, zigzag)
    out, info, left = _attend(q, k, v, heads, lengths, offset, *settings)
    found = out if return_lse else (out,)
    found = (*found, info) if return_info else found
    found = found if left is None else (*found, left)
    return found if len(found) > 1 else found[0]


def _if_slower(pattern: Patterns, q: Array, k: Array) -> str:
    """What to say if sparse attention is predicted to be slower than dense; "" otherwise, and where budgets are arrays.

    By up to 2 % counts as even.
    """
    if isinstance(pattern, LayerPatterns):
        return ""
    t, n, h = q.shape[1:]
    heads = patterns_of_heads(pattern, n)
    dense, sparse, source = predicted(heads, n, h, t, k.shape[1], target().device_kind)
    if sparse <= 1.02 * dense:
        return ""
    return f"; dense attention is predicted to be faster: {dense:.3g} ms instead of {sparse:.3g} ({source})"


@partial(
    jax.jit, static_argnames=("scale", "implementation", "return_lse", "return_info", "remark", "axis_name", "zigzag")
)
def _attend(
    q: Array,
    k: Array,
    v: Array,
    heads: LayerPatterns,
    lengths: Array | None,
    q_offset: Array,
    scale: float,
    implementation: Any,
    return_lse: bool,
    return_info: bool,
    remark: str,
    axis_name: str | None,
    zigzag: Zigzag | None,
) -> tuple[Any, AttentionInfo | None, Array | None]:
    b, n = q.shape[0], q.shape[2]
    where: dict[str, Any] = {"lengths": lengths, "q_offset": q_offset, "scale": scale}
    everything = jnp.ones((b, n), jnp.float32)
    keeps_to_plans = implementation is not None and find_backend(implementation).keeps_to_plans
    dense_name = None if keeps_to_plans else implementation

    def sparse_kernel(q: Array, k: Array, v: Array, plan: SparsePlan, q_offset: Array) -> Any:
        place: dict[str, Any] = where | {"q_offset": q_offset, "return_lse": return_lse}
        return pallas_kernels.sparse_attention(q, k, v, plan, implementation=implementation, **place)

    def dense_kernel(q: Array, k: Array, v: Array, _: None, q_offset: Array) -> Any:
        place: dict[str, Any] = where | {"q_offset": q_offset, "return_lse": return_lse}
        return pallas_kernels.dense_attention(q, k, v, implementation=dense_name, **place)

    def rows(kernel: Any, *inputs: Any) -> Any:
        return kernel(*inputs) if zigzag is None else zigzag.attend(kernel, *inputs)

    if heads.covers >= k.shape[1] and not keeps_to_plans:
        choice = choose_implementation(q, k, v, None, implementation=dense_name)
        out: Any = rows(dense_kernel, q, k, v, None, q_offset)
        reason = f"the budgets cover all {k.shape[1]} keys: dense attention; {choice.reason}"
        info = AttentionInfo(everything, everything, choice.name, reason) if return_info else None
        return out, info, heads.unspent

    def sparse() -> tuple[Any, Array, Array, Array | None]:
        plan = make_plan(q, k, heads, **where, axis_name=axis_name)
        out = rows(sparse_kernel, q, k, v, plan, q_offset)
        if not return_info and heads.unspent is None:
            return out, everything, everything, None
        density = plan.density(q.shape[1], k.shape[1], q_offset=q_offset, lengths=lengths)
        left = heads.left(density, axis_name)
        if not return_info:
            return out, everything, everything, left
        arrays = (q, k, plan, kv_limit(lengths, b, k.shape[1]), q_offset)
        held = by_device(estimated_recall, arrays, RECALL_AXES, PER_HEAD, scale=scale)
        return out, density, held, left

    def dense() -> tuple[Any, Array, Array, Array | None]:
        return rows(dense_kernel, q, k, v, None, q_offset), everything, everything, heads.unspent

    all_dense = heads.all_dense()
    if all_dense is not None and axis_name is not None:  # of the layer's heads, wherever they are
        all_dense = jax.lax.pmin(all_dense.astype(jnp.int32), axis_name) == 1
    # One scanned program serves all layers; those without a sparse head skip the index.
    out, density, held, left = sparse() if all_dense is None else jax.lax.cond(all_dense, dense, sparse)
    if not return_info:
        return out, None, left
    plan_shape = jax.eval_shape(lambda: make_plan(q, k, heads, **where, axis_name=axis_name))
    choice = choose_implementation(q, k, v, plan_shape, implementation=implementation)
    return out, AttentionInfo(density, held, choice.name, choice.reason + remark), left
