"""Attention in each of the three patterns, from what describes the pattern: a plan is built, and the keys visited."""

from __future__ import annotations

from typing import Literal, Unpack, overload

from jaxtyping import Array, Float, Int

from pallas_kernels.attention import Options, Output, OutputAndLse, sparse_attention
from pallas_kernels.checks import check_positions, check_qkv
from pallas_kernels.plan_builders import a_shape_plan, block_sparse_plan, vertical_slash_plan
from pallas_kernels.spread import PER_HEAD, by_device
from pallas_kernels.tracing import under_own_settings


@overload
def a_shape_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    sink: int,
    window: int,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Output: ...
@overload
def a_shape_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    sink: int,
    window: int,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> OutputAndLse: ...
@under_own_settings
def a_shape_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    sink: int,
    window: int,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Output | OutputAndLse:
    """A-shape attention: every query sees the first `sink` keys and its last `window` keys (StreamingLLM's mask).

    **Arguments:**

    - `sink` (static): >= 0 keys from position 0, cut to the s that there are.
    - `window` (static): >= 0 keys back from the query, its own included; rounded out to 64-key tiles.
    - The rest: as `sparse_attention`.

    **Returns, raises:** as `sparse_attention`; ValueError for a negative `sink` or `window`.

    Source: MInference (arXiv 2407.02490) §3.2; official `streaming_forward(n_init, n_local)`.
    """
    check_qkv(q, k, v)
    s = k.shape[1]
    plan = a_shape_plan(q.shape[0], q.shape[2], sink=min(sink, s), window=min(window, s))
    return sparse_attention(q, k, v, plan, return_lse=return_lse, **options)


@overload
def vertical_slash_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    columns: Int[Array, "b n C"],
    slashes: Int[Array, "b n S"],
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Output: ...
@overload
def vertical_slash_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    columns: Int[Array, "b n C"],
    slashes: Int[Array, "b n S"],
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> OutputAndLse: ...
@under_own_settings
def vertical_slash_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    columns: Int[Array, "b n C"],
    slashes: Int[Array, "b n S"],
    *,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Output | OutputAndLse:
    """Vertical-slash attention: every query sees the listed key columns and the keys at the listed distances.

    **Arguments:**

    - `columns`: int32 `[b, n, C]`, key positions; exact.
    - `slashes`: int32 `[b, n, S]`, query-key distances; each line is rounded out to 64-key tiles.
    - Both in any order. Entries that are negative (by custom -1), repeated or out of range are ignored. The diagonal
      is always visited.
    - The rest: as `sparse_attention`.

    **Returns, raises:** as `sparse_attention`; ValueError when `columns` or `slashes` do not fit q.

    Source: MInference (arXiv 2407.02490) §3.2, Algorithm 2; official `vertical_slash_sparse_attention`.
    """
    check_qkv(q, k, v)
    check_positions("columns", columns, q.shape[0], q.shape[2], 3)
    check_positions("slashes", slashes, q.shape[0], q.shape[2], 3)
    plan = by_device(vertical_slash_plan, (columns, slashes), (PER_HEAD, PER_HEAD), PER_HEAD, kv_len=k.shape[1])
    return sparse_attention(q, k, v, plan, return_lse=return_lse, **options)


@overload
def block_sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    blocks: Int[Array, "b n i M"],
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Output: ...
@overload
def block_sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    blocks: Int[Array, "b n i M"],
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> OutputAndLse: ...
@under_own_settings
def block_sparse_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    blocks: Int[Array, "b n i M"],
    *,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Output | OutputAndLse:
    """Block-sparse attention: every tile of 128 queries sees its diagonal and the listed 64-key tiles.

    **Arguments:**

    - `blocks`: int32 `[b, n, i, M]`, key-tile numbers (key position // 64) for each query tile, in any order. Entries
      that are negative (by custom -1), repeated or out of range are ignored.
    - The rest: as `sparse_attention`.

    **Returns, raises:** as `sparse_attention`; ValueError when `blocks` does not fit q.

    Source: MInference (arXiv 2407.02490) §3.2, Algorithm 3; official `block_sparse_attention` (64-query rows).
    """
    check_qkv(q, k, v)
    check_positions("blocks", blocks, q.shape[0], q.shape[2], 4)
    plan = by_device(block_sparse_plan, (blocks,), (PER_HEAD,), PER_HEAD)
    return sparse_attention(q, k, v, plan, return_lse=return_lse, **options)
