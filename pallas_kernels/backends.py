"""The backends of attention, best first: the one file that knows which there are.

To add one: write a module with `unsupported_reason` and `attend` (see `Backend`), import it here, and put a `Backend`
into `SPARSE_BACKENDS`. Its name also goes into the two `Literal` types, for editors and type checkers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from jaxtyping import Array, Float, Int

from pallas_kernels import cudnn, reference, tables
from pallas_kernels.device import Device
from pallas_kernels.hopper import attention as hopper
from pallas_kernels.mma import attention as mma
from pallas_kernels.plan import SparsePlan
from pallas_kernels.xla import attention as xla

Implementation = Literal["hopper", "mma", "xla", "reference"]
DenseImplementation = Literal["cudnn", "hopper", "mma", "xla", "reference"]


class UnsupportedReason(Protocol):
    """Why a backend cannot serve a call, in words for the caller; None if it can.

    Looks at shapes, dtypes and the plan's static fields only, so abstract arrays will do. `plan` None means dense
    attention: every causal key. `device` is what the call will run on; None leaves the device out of the question, so
    that a kernel can be lowered on a machine that has no GPU.
    """

    def __call__(
        self,
        q: Float[Array, "b t n h"],
        k: Float[Array, "b s k h"],
        v: Float[Array, "b s k h"],
        plan: SparsePlan | None,
        *,
        device: Device | None,
    ) -> str | None: ...


class Attend(Protocol):
    """Attention over the keys of a plan, or over every causal key if `plan` is None.

    Arguments have been checked, and `unsupported_reason` has been asked: `lengths` is an integer `[b]` or None,
    `q_offset` an int32 scalar and multiple of 128, `scale` a positive float.

    **Returns:** the output `[b, t, n, h]` in q's dtype, and the log-sum-exp, float32 `[b, t, n]` (natural logarithm),
    which may be None unless `return_lse`. Rows at or past a sequence's length are zero, their log-sum-exp is −inf.
    """

    def __call__(
        self,
        q: Float[Array, "b t n h"],
        k: Float[Array, "b s k h"],
        v: Float[Array, "b s k h"],
        plan: SparsePlan | None,
        *,
        lengths: Int[Array, " b"] | None,
        q_offset: Int[Array, ""],
        scale: float,
        return_lse: bool,
    ) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"] | None]: ...


class Prepare(Protocol):
    """What a kernel makes of a plan before it runs: arrays in, a pytree of arrays out."""

    def __call__(
        self,
        plan: SparsePlan,
        q: Float[Array, "b t n h"],
        k: Float[Array, "b s k h"],
        v: Float[Array, "b s k h"],
        *,
        lengths: Int[Array, " b"] | None,
        q_offset: Int[Array, ""],
    ) -> Any: ...


class Remark(Protocol):
    """What a caller should know when a backend is chosen, in words; "" for nothing."""

    def __call__(self, device: Device) -> str: ...


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of attention over a plan.

    - `name`: what callers give as `implementation`.
    - `unsupported_reason`, `attend`: see `UnsupportedReason` and `Attend`.
    - `remark`: see `Remark`.
    - `differentiable`: whether reverse-mode differentiation works.
    - `keeps_to_plans`: who forces this backend wants its kernel to run. Code that could serve a call by dense
      attention, because a plan would cover every key, keeps to the plan; heads that are dense by themselves get the
      best dense backend, whatever its name.
    - `prepare`: see `Prepare`; None where nothing is prepared apart from the attention itself.
    """

    name: str
    unsupported_reason: UnsupportedReason
    attend: Attend
    remark: Remark = lambda device: ""
    differentiable: bool = False
    keeps_to_plans: bool = False
    prepare: Prepare | None = None


SPARSE_BACKENDS = (
    Backend(
        "hopper",
        hopper.unsupported_reason,
        hopper.hopper_attention,
        remark=hopper.remark,
        differentiable=True,
        keeps_to_plans=True,
        prepare=tables.prepare,
    ),
    Backend(
        "mma",
        mma.unsupported_reason,
        mma.mma_attention,
        remark=mma.remark,
        differentiable=True,
        keeps_to_plans=True,
        prepare=tables.prepare,
    ),
    Backend("xla", xla.unsupported_reason, xla.attend, differentiable=True),
    Backend("reference", reference.unsupported_reason, reference.attend, differentiable=True),
)
"""What serves a plan, best first."""

DENSE_BACKENDS = (
    Backend("cudnn", cudnn.unsupported_reason, cudnn.attend, remark=cudnn.remark),
    *SPARSE_BACKENDS,
)
"""What serves dense attention, best first."""


class Choice(NamedTuple):
    """The implementation that serves a call and the reason, in words for the caller."""

    name: str
    reason: str

    @property
    def backend(self) -> Backend:
        """The backend of that name."""
        return find_backend(self.name)


def find_backend(name: str, *, sparse: bool = False) -> Backend:
    """The backend of a name, with `sparse` one that serves plans. Raises ValueError for names that no backend has."""
    return _named(name, SPARSE_BACKENDS if sparse else DENSE_BACKENDS)


def choose_implementation(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan | None,
    *,
    implementation: DenseImplementation | None = None,
    device: Device | None = None,
) -> Choice:
    """The implementation that serves a call, and why: the first backend that can.

    **Arguments:** those of `sparse_attention`, or with `plan` None those of `dense_attention`; shapes and dtypes
    count, so abstract arrays will do. `device`: what the call will run on, by default the default device.

    **Raises:** ValueError when `implementation` is unknown, or names a backend that cannot serve the call (with the
    reason). Forcing one skips the check of the device, so that a kernel can be lowered on a machine without one.
    """
    backends: Sequence[Backend] = DENSE_BACKENDS if plan is None else SPARSE_BACKENDS
    if implementation is not None:
        backend = _named(implementation, backends)
        reason = backend.unsupported_reason(q, k, v, plan, device=None)
        if reason is not None:
            raise ValueError(f'implementation="{implementation}" cannot serve this call: {reason}')
        return Choice(backend.name, "asked for")
    device = device or Device.default()
    against = []
    for backend in backends:
        reason = backend.unsupported_reason(q, k, v, plan, device=device)
        if reason is None:
            # What ruled out the better ones, each reason once: several kernels may share it.
            said = dict.fromkeys([*against, backend.remark(device)])
            return Choice(backend.name, "; ".join(filter(None, said)))
        against.append(reason)
    raise NotImplementedError(f"no backend serves this call: {'; '.join(dict.fromkeys(against))}")


def _named(name: str, backends: Sequence[Backend]) -> Backend:
    for backend in backends:
        if backend.name == name:
            return backend
    known = [f'"{backend.name}"' for backend in backends]
    raise ValueError(f"implementation must be None, {', '.join(known[:-1])} or {known[-1]}; got {name!r}")
