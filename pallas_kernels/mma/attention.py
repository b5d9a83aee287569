"""Sparse attention on every NVIDIA GPU since Ampere: the wrapper around the warp-level Mosaic GPU kernel.

What was tried, on an H200 in the form for compute capability 8.0 (jax 0.11.2, 128K tokens, 32 query and 8 KV heads,
head_dim 128, bf16), in TF/s on the key tiles of vertical-slash / block-sparse / A-shape plans of about 100 tiles:

1. 64 rows a thread block, 64 keys a step, 2 stages: 289 / 292 / 295; 16 rows a warp are bound by shared memory.
2. Queries held in registers: 304 / 302 / 314; with 32 keys a step and 3 stages 295 / 294 / 308.
3. 128 rows, 32 a warp: 372 / 366 / 386, although this version spilled 180 bytes. The form with TMA: 387 / 381 / 396.
4. 128 rows and 32 keys: 352 / 352 / 355 with 2 stages, 354 / 347 / 362 with 3, 351 / 351 / 352 with 4.
5. 128 rows, 64 keys and 3 stages, which leave room for one thread block a multiprocessor: 294 / 296 / 301.
6. Fragments read right before their products, a mask of one number a thread: 528 bytes of spills become 180.
7. Probabilities rounded and added up a few columns at a time, one loop body for the diagonal, 32 keys from head_dim 96
   on: 363 for vertical-slash, nothing spilled. On 12.0 64 rows and cp.async: TMA makes a call of every copy there.
8. Thread numbers read anew in every step, to keep addresses out of registers: more spills, not less.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import axes
from pallas_kernels import tables as kernel_tables
from pallas_kernels.device import Device
from pallas_kernels.launches import Refs, differentiable
from pallas_kernels.mma.config import BLOCK_SHARED_MEMORY, HEAD_DIMS, KernelConfig, default_config
from pallas_kernels.mma.kernel import kernel_body
from pallas_kernels.mma.launch import Launch, scratch_types
from pallas_kernels.plan import SparsePlan
from pallas_kernels.plan_builders import full_plan
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE, num_query_tiles
from pallas_kernels.tracing import without_axes


def target_capability() -> tuple[int, ...]:
    """The compute capability that programs are made for; 9.0 where that is no GPU."""
    return Device.default().version or (9, 0)


def unsupported_reason(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan | None,
    *,
    device: Device | None,
) -> str | None:
    """Why this kernel cannot serve a call, in words for the caller; None if it can (see `backends`)."""
    del plan
    if device is not None:
        capabilities = [".".join(map(str, capability)) for capability in BLOCK_SHARED_MEMORY]
        reason = device.reason_against("the warp-level kernel", capabilities)
        if reason is not None:
            return reason
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the warp-level kernel computes in bfloat16 or float16; q is {q.dtype}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v must have one dtype; they are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"the warp-level kernel serves head_dim {', '.join(map(str, HEAD_DIMS))}; q has {q.shape[-1]}"
    if 0 in q.shape or 0 in k.shape:
        return f"nothing to compute: q has shape {q.shape} and k {k.shape}"
    return None


def remark(device: Device) -> str:
    """Why this kernel was chosen."""
    return f"the warp-level kernel serves compute capability {device.capability}"


def mma_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan | None,
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    return_lse: bool = False,
    config: KernelConfig | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"] | None]:
    """Attention over the keys of a plan: softmax(scale · q kᵀ + mask) v, the mask being `plan.to_mask(...)`.

    **Arguments:** as `pallas_kernels.sparse_attention`, but `plan` None stands for every causal key; and `config`:
    static tuning, by default what serves this head_dim on the present GPU (without one, on compute capability 9.0);
    `interpret`: parameters of the Mosaic GPU interpreter, to run on a CPU.

    **Returns:** the output in q's dtype, zero at rows at or past a sequence's length; and with `return_lse` the
    log-sum-exp (natural logarithm, float32 `[b, t, n]`, −inf where the output is zero), without it None.

    Padding rows of k and v may hold anything. Values inside a sequence have to be finite: what is not reaches all rows
    of its query tile, besides those that see it. Differentiable in q, k and v: the backward pass is
    `xla.backward.attention_backward` over the same plan.

    **Raises:** ValueError for what the kernel can't serve (see `unsupported_reason`), a configuration that needs more
    shared memory than the GPU has, or a scale that is not positive.
    """
    reason = unsupported_reason(q, k, v, plan, device=None)
    if reason is not None:
        raise ValueError(f"the warp-level kernel can't serve this call: {reason}")
    plan = full_plan(q.shape[0], q.shape[2], k.shape[1]) if plan is None else plan
    capability = target_capability()
    config = config or default_config(q.shape[-1], capability)
    if not config.fits(q.shape[-1], capability):
        raise ValueError(
            f"{config} needs {config.shared_memory_bytes(q.shape[-1])} bytes of shared memory at head_dim "
            f"{q.shape[-1]}{' and TMA' if config.tma else ''}, more than a thread block gets on compute capability "
            f"{'.'.join(map(str, capability))}"
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}")
    limits = None if lengths is None else lengths.astype(jnp.int32)
    offset = jnp.asarray(q_offset, jnp.int32)
    return _attention(q, k, v, plan, limits, offset, scale, return_lse, config, interpret)


@differentiable
def _attention(q, k, v, plan, lengths, q_offset, scale, return_lse, config, interpret):
    tables = kernel_tables.prepare(plan, q, k, v, lengths=lengths, q_offset=q_offset)
    return attend(q, k, v, tables, scale=scale, return_lse=return_lse, config=config, interpret=interpret)


def attend(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    tables: kernel_tables.KernelTables,
    *,
    scale: float,
    return_lse: bool,
    config: KernelConfig,
    interpret: Any = None,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"] | None]:
    """Launches the kernel on prepared tables: `mma_attention` without its checks and preparation."""
    b, t, n, h = q.shape
    launch = Launch(
        config=config,
        heads=n,
        kv_heads=k.shape[2],
        query_tiles=num_query_tiles(t),
        head_dim=h,
        scale=scale,
        dtype=q.dtype,
        emulate=interpret is not None,
    )
    # Results are stored by whole query tiles. cp.async reads whole key tiles too; TMA fills in what lies past the end.
    multiple = 8 if config.tma else QUERY_TILE
    q = _pad_rows(q, QUERY_TILE)
    k, v = (_pad_rows(x, multiple) for x in (k, v))
    inputs = {"q": q, "k": k, "v": v} | {f.name: getattr(tables, f.name) for f in dataclasses.fields(tables)}
    inputs = {name: array for name, array in inputs.items() if array is not None}
    for name in ("keys", "values"):
        if name in inputs and not config.tma:
            inputs[name] = _pad_rows(inputs[name], KEY_TILE)
    out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if return_lse:
        out_type.append(jax.ShapeDtypeStruct((b * n, q.shape[1]), jnp.float32))

    def body(*refs, **scratch):
        named = dict(zip([*inputs, "out", "lse"], refs, strict=False))
        kernel_body(launch, Refs(**{f.name: named.get(f.name) for f in dataclasses.fields(Refs)}), scratch)

    outputs: Any = without_axes(
        plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=scratch_types(launch),
            grid=(b * n, launch.query_tiles * launch.blocks_per_tile),
            grid_names=(axes.HEAD, axes.BLOCK),
            interpret=interpret,
            kernel_name="sparse_attention_mma",
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                reduction_scratch_bytes=0,
                unsafe_no_auto_barriers=True,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
        )
    )(*inputs.values())
    if not return_lse:
        return outputs[0][:, :t], None
    return outputs[0][:, :t], outputs[1].reshape(b, n, -1)[:, :, :t].transpose(0, 2, 1)


def _pad_rows(x: Float[Array, "b t *w"], multiple: int) -> Float[Array, "b T *w"]:
    """Zero rows up to a multiple. Free where there is nothing to pad."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))
