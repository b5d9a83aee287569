"""Softmax mass of every 64-key tile for every query tile, from a few exact probe rows.

The one public function of this folder, `tile_masses`, beside it the keys that are made of masses on the way, the choice
of what computes them, and the checks. `hopper` and `xla` hold the two forms, whose masses agree; keys that the first
makes of products in FP8 agree nearly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16

from pallas_kernels.backends import Choice
from pallas_kernels.checks import check_lengths, check_q_offset, check_qkv, check_scale
from pallas_kernels.device import Device
from pallas_kernels.index.hopper import HEAD_DIMS, hopper_masses
from pallas_kernels.index.tile_keys import TileRule
from pallas_kernels.index.xla import xla_masses
from pallas_kernels.plan import kv_limit
from pallas_kernels.spread import KV_AXES, PER_HEAD, PER_SEQUENCE, Q_AXES, WHOLE, by_device
from pallas_kernels.tracing import under_own_settings

MassImplementation = Literal["hopper", "xla"]


class Form(NamedTuple):
    """One way to compute tile masses; `kernels`: whether it, and so what follows it, runs as kernels of ours."""

    masses: Callable[..., Any]
    kernels: bool


FORMS = {"hopper": Form(hopper_masses, kernels=True), "xla": Form(xla_masses, kernels=False)}
"""The forms by name: the kernel, and the one that runs anywhere."""


@overload
def tile_masses(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    rows: Int[Array, "b i p"],
    share: Float[Array, "b i p"],
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: MassImplementation | None = None,
    return_lse: Literal[False] = False,
) -> Array: ...
@overload
def tile_masses(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    rows: Int[Array, "b i p"],
    share: Float[Array, "b i p"],
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: MassImplementation | None = None,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...
@under_own_settings
def tile_masses(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    rows: Int[Array, "b i p"],
    share: Float[Array, "b i p"],
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: MassImplementation | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention weight that a few rows of each query tile give to each key tile, by their exact causal softmax.

        mass[b, n, i, j] = sum over p of share[b, i, p] · softmax(scale · q[rows[b, i, p]] kᵀ)[keys of tile j]

    With every row of a query tile a probe of share 1 these are the masses themselves. With every m-th row a probe of
    share m they are an estimate, at 1 / m of the cost.

    **Arguments:**

    - `q`: `[b, t, n, h]`; `k`: `[b, s, k, h]`, one floating dtype; n is a multiple of k, and s >= q_offset + t.
    - `rows`: int32 `[b, i, p]`, row numbers in q of the probes of each query tile. A kernel saves work where rows of
      neighbouring tiles are near each other; the result does not depend on it.
    - `share`: float32 `[b, i, p]`, how many rows each probe stands for. One with a share of 0 or less is none, nor is
      one whose row is not in [0, t) or lies at or past its sequence's length.
    - `lengths`, `q_offset`, `scale`: as for `sparse_attention`.
    - `implementation` (static): None (the best for this call), "hopper" (a kernel for compute capability 9.0) or "xla"
      (jnp, on every other device).
    - `return_lse` (static): also return the log-sum-exp of each probe's scores.

    **Returns:** float32 `[b, n, i, j]` with j = ceil(s / 64); sums over j are the shares of each query tile. With
    `return_lse` also float32 `[b, n, i, p]`, natural logarithm, −inf for a probe that is none. Where a row's scores
    rise by more than 133 (a factor of e¹³³) within the keys of a thread block, the kernel counts that as about 133:
    masses stay finite and keep their sums, but tiles that rise further are not told apart.

    **Raises:** TypeError and ValueError at trace time, naming the argument and the shapes.

    Cost: 2 · h · (keys before the probes) operations a probe and head, one exponential each. Memory: the kernel leaves
    4 bytes for each probe, head and key tile; the twin works through a part of the probes at a time.
    """
    check_qkv(q, k, k)
    lengths = check_lengths(lengths, q.shape[0], k.shape[1])
    for name, x, kind in (("rows", rows, jnp.int32), ("share", share, jnp.float32)):
        if x.dtype != kind:
            raise TypeError(f"{name} must be {jnp.dtype(kind).name}, got {x.dtype}")
        if x.ndim != 3 or x.shape[0] != q.shape[0] or 0 in x.shape or x.shape != rows.shape:
            raise ValueError(
                f"rows and share must have one shape [{q.shape[0]}, query tiles, probes], got {rows.shape} and "
                f"{share.shape}"
            )
    offset = check_q_offset(q_offset, q.shape[1], k.shape[1])
    factor = check_scale(scale, q)
    choice = choose_masses(q, k, implementation)
    arrays = (q, k, rows, share, kv_limit(lengths, q.shape[0], k.shape[1]), offset)
    axes = (Q_AXES, KV_AXES, PER_SEQUENCE, PER_SEQUENCE, PER_SEQUENCE, WHOLE)
    mass, lse = by_device(_masses, arrays, axes, (PER_HEAD, PER_HEAD), name=choice.name, scale=factor)
    return (mass, lse) if return_lse else mass


def _masses(
    q: Array, k: Array, rows: Array, share: Array, lengths: Array, q_offset: Array, *, name: str, scale: float
) -> tuple[Array, Array]:
    positions, share = _probes(q, rows, share, lengths, q_offset)
    return FORMS[name].masses(q, k, rows, positions, share, scale=scale)


def tile_keys(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    rows: Int[Array, "b i p"],
    share: Float[Array, "b i p"],
    rule: TileRule,
    *,
    lengths: Int[Array, " b"],
    q_offset: Int[Array, ""],
    scale: float,
    implementation: MassImplementation | None = None,
) -> UInt16[Array, "b n i j"]:
    """What a visit of each tile is worth by its mass: `rule.keys(tile_masses(...))`, of which a kernel stores only the
    keys. The kernel may multiply in FP8 (`fp8.pays_in_fp8`); then keys are nearly those. Arguments as there, on one
    device."""
    form = FORMS[choose_masses(q, k, implementation).name]
    positions, share = _probes(q, rows, share, lengths, q_offset)
    return form.masses(q, k, rows, positions, share, scale=scale, rule=rule)


def _probes(
    q: Array, rows: Array, share: Array, lengths: Array, q_offset: Array
) -> tuple[Int[Array, "b i p"], Float[Array, "b i p"]]:
    """The last key of each probe, -1 for one that is none, and how many rows it stands for."""
    share = jnp.maximum(share, 0)
    limit = jnp.minimum(lengths - q_offset, q.shape[1])[:, None, None]
    probes = (share > 0) & (rows >= 0) & (rows < limit)
    return jnp.where(probes, rows + q_offset, -1), share


def choose_masses(
    q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], implementation: MassImplementation | None = None
) -> Choice:
    """What computes tile masses of these queries and keys (shapes and dtypes only), and why.

    **Raises:** ValueError when `implementation` is unknown or cannot serve the call (with the reason).
    """
    if implementation is not None and implementation not in FORMS:
        known = ", ".join(f'"{name}"' for name in FORMS)
        raise ValueError(f"implementation must be None, {known}, got {implementation!r}")
    if implementation is not None and not FORMS[implementation].kernels:
        return Choice(implementation, "asked for")
    reason = unsupported_reason(q, k, device=Device.default() if implementation is None else None)
    if implementation is not None and reason is not None:
        raise ValueError(f'implementation="{implementation}" cannot serve this call: {reason}')
    kernel, anywhere = FORMS
    if reason is not None:
        return Choice(anywhere, reason)
    return Choice(kernel, "" if implementation is None else "asked for")


def unsupported_reason(q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], *, device: Device | None) -> str | None:
    """Why the Hopper kernel cannot serve a call, in words for the caller; None if it can.

    **Arguments:** `device`: what the call will run on; None leaves the device out of the question.
    """
    against = None if device is None else device.reason_against("the kernel of tile masses", ("9.0",))
    if against is not None:
        return against
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel of tile masses computes in bfloat16 or float16; q is {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"the kernel of tile masses serves head_dim {', '.join(map(str, HEAD_DIMS))}; q has {q.shape[-1]}"
    return None
