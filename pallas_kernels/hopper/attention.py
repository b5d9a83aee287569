"""Sparse attention on Hopper GPUs (compute capability 9.0): the wrapper around the Mosaic GPU kernel.

Its versions, in ms on an H100 for a vertical-slash index at 128K tokens (32 / 8 heads, head_dim 128, bfloat16):

- 28.3: two compute warpgroups beside one that loads; 27.2 with one persistent thread block a multiprocessor;
- 27.1: the scores of a step are issued beside the value product of the step before; 25.4: so is its softmax;
- 27.3: chains of 4 query tiles, which share keys in the L2 cache (224 instead of 243 at 1M tokens);
- 25.1: bands at any distance, which visit 12 % fewer keys for the same index;
- 24.3: running maxima that follow lazily, one loading warp. Runs differ by 5 to 10 %, for power is the limit.

`notebooks/hopper-kernel.md` has every version, what single parts cost, and what did not help.
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
from pallas_kernels import tables as hopper_tables
from pallas_kernels.device import Device
from pallas_kernels.hopper.assembler import ignores_setmaxnreg
from pallas_kernels.hopper.buffers import scratch_types
from pallas_kernels.hopper.config import HEAD_DIMS, KernelConfig
from pallas_kernels.hopper.kernel import kernel_body
from pallas_kernels.hopper.launch import Launch
from pallas_kernels.launches import Refs, differentiable
from pallas_kernels.plan import SparsePlan
from pallas_kernels.plan_builders import full_plan
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE, num_query_tiles
from pallas_kernels.tracing import without_axes

CAPABILITIES = ("9.0",)
"""Compute capabilities that the kernel is made for."""


def unsupported_reason(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan | None,
    *,
    device: Device | None,
) -> str | None:
    """Why this kernel can't serve a call, in words for the caller; None if it can. See `backends.UnsupportedReason`."""
    if device is not None and (reason := device.reason_against("the Hopper kernel", CAPABILITIES)) is not None:
        return reason
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the Hopper kernel computes in bfloat16 or float16; q is {q.dtype}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v must have one dtype; they are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"the Hopper kernel serves head_dim {', '.join(map(str, HEAD_DIMS))}; q has {q.shape[-1]}"
    if 0 in q.shape or 0 in k.shape:
        return f"nothing to compute: q has shape {q.shape} and k {k.shape}"
    if not KernelConfig().fits(q.shape[-1]):
        return f"head_dim {q.shape[-1]} needs more shared memory than a multiprocessor has"
    return None


def remark(device: Device) -> str:
    """Why this kernel was chosen, and whether it runs slower here than it could."""
    slower = "; in a slower form than with jax 0.11: nvJitLink ignores setmaxnreg"
    return "a Hopper GPU is present" + (slower if ignores_setmaxnreg() else "")


def hopper_attention(
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
    static tuning, by default `default_config`; `interpret`: parameters of the Mosaic GPU interpreter, to run on a
    CPU.

    **Returns:** the output in q's dtype, zero at rows at or past a sequence's length; and with `return_lse` the
    log-sum-exp (natural logarithm, float32 `[b, t, n]`, −inf where the output is zero), without it None.

    Padding rows of k and v may hold anything. Values inside a sequence have to be finite: what is not reaches all rows
    of its query tile, besides those that see it. Differentiable in q, k and v: the backward pass is
    `xla.backward.attention_backward` over the same plan.

    **Raises:** ValueError for what the kernel can't serve (see `unsupported_reason`) or a scale that is not positive.
    Too much shared memory and too many registers are refused at trace time.
    Should CUDA's assembler fail later, while a surrounding jit is compiled, that error reaches the caller: nothing
    inside a traced program can catch it. `implementation="xla"` is the way around.
    """
    reason = unsupported_reason(q, k, v, plan, device=None)
    if reason is not None:
        raise ValueError(f"the Hopper kernel can't serve this call: {reason}")
    plan = full_plan(q.shape[0], q.shape[2], k.shape[1]) if plan is None else plan
    config = default_config(plan) if config is None else config
    if not config.fits(q.shape[-1]):
        raise ValueError(
            f"{config} needs {config.shared_memory_bytes(q.shape[-1])} bytes of shared memory at head_dim "
            f"{q.shape[-1]}, more than a multiprocessor has"
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}")
    limits = None if lengths is None else lengths.astype(jnp.int32)
    offset = jnp.asarray(q_offset, jnp.int32)
    return _attention(q, k, v, plan, limits, offset, scale, return_lse, config, interpret)


def default_config(plan: SparsePlan) -> KernelConfig:
    """Static tuning for a plan, as far as its parts decide it."""
    if not ignores_setmaxnreg():
        return KernelConfig()
    # The form without overlap begins no query tile beside the one before, and without bands they share no keys.
    return KernelConfig(chain=1 if plan.bands is None else KernelConfig.chain, overlap=False)


@differentiable
def _attention(q, k, v, plan, lengths, q_offset, scale, return_lse, config, interpret):
    tables = hopper_tables.prepare(plan, q, k, v, lengths=lengths, q_offset=q_offset)
    aligned = plan.bands is None or plan.band_multiple % KEY_TILE == 0
    options = {"scale": scale, "return_lse": return_lse, "config": config, "interpret": interpret}
    return attend_prepared(q, k, v, tables, aligned=aligned, **options)


def attend_prepared(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    tables: hopper_tables.KernelTables,
    *,
    scale: float,
    return_lse: bool,
    config: KernelConfig,
    aligned: bool,
    interpret: Any = None,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"] | None]:
    """Launches the kernel on prepared tables: `hopper_attention` without its checks and preparation.

    `aligned` promises that every band of the tables is a multiple of 64.
    """
    b, t, n, h = q.shape
    query_tiles = num_query_tiles(t)
    rounds = config.rounds_for(b * n * query_tiles)
    launch = Launch(
        config=config,
        rounds=rounds,
        heads=n,
        kv_heads=k.shape[2],
        query_tiles=query_tiles,
        work=b * n * query_tiles,
        head_dim=h,
        scale=scale,
        dtype=q.dtype,
        aligned=aligned,
        emulate=interpret is not None,
    )
    q, k, v = (_pad_rows(x) for x in (q, k, v))
    inputs = {"q": q, "k": k, "v": v} | {f.name: getattr(tables, f.name) for f in dataclasses.fields(tables)}
    inputs = {name: array for name, array in inputs.items() if array is not None}
    # Rows of the LSE are copied 64 at a time in one dimension: padded to whole tiles so that each row starts aligned.
    out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if return_lse:
        out_type.append(jax.ShapeDtypeStruct((b * n, query_tiles * QUERY_TILE), jnp.float32))

    def body(*refs, **scratch):
        named = dict(zip([*inputs, "out", "lse"], refs, strict=False))
        kernel_body(launch, Refs(**{f.name: named.get(f.name) for f in dataclasses.fields(Refs)}), scratch)

    outputs = without_axes(
        plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=scratch_types(launch, return_lse),
            grid=(rounds.thread_blocks,),
            grid_names=(axes.BLOCK,),
            num_threads=3,
            thread_name=axes.WARPGROUP,
            interpret=interpret,
            kernel_name="sparse_attention",
            compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        )
    )(*inputs.values())
    if not return_lse:
        return outputs[0][:, :t], None
    return outputs[0][:, :t], outputs[1].reshape(b, n, -1)[:, :, :t].transpose(0, 2, 1)


def _pad_rows(x: Float[Array, "b t n h"]) -> Float[Array, "b T n h"]:
    """Zero rows up to a multiple of 8, the row tiling of swizzled TMA copies. Free where there is nothing to pad."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))
