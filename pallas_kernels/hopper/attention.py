"""Sparse attention on Hopper GPUs (compute capability 9.0): the wrapper around the Mosaic GPU kernel.

What was tried, each with its effect on an H100 80GB HBM3 (700 W, driver 580.159, jax 0.11.2); vertical-slash index of
1,024 columns and about 5,900 slash distances, 32 query heads, 8 KV heads, bf16, batch 1. The GPU reaches its power
limit within a fraction of a second of this work: cuDNN and this kernel both slow down by 5 to 10 % from their first
runs to a steady state, so only figures of one run compare.

| version | 128K tokens | 1M tokens |
|---|---|---|
| 1. two compute warpgroups, one memory warpgroup, one query tile a thread block | 28.3 ms | 231 ms |
| 2. persistent: 132 thread blocks, loads run into the next query tile | 27.2 ms | 239 ms |
| 3. scores of a step issued together with the value product of the step before | 27.1 ms | 243 ms |
| 4. chains of 4 query tiles: neighbours stay together and share the L2 cache | 27.3 ms | **224 ms** |
| 5. softmax beside the value product; columns inside the window left out | 25.4 rested, 28.1 steady | 241 steady |
| 6. bands at any distance: 12 % fewer keys for the same index; fewer kernels prepare the plan | **25.1** | **215** |
| 7. query tiles overlap; values in one wgmma; no turns (below) | 26.0 steady | 217 steady |
| 8. maxima that follow lazily; one loading warp; bias copied ahead (below) | **24.3** steady | **205** steady |

Version 7 begins each query tile beside the last step of the one before, multiplies by the values in one wgmma although
they arrive in parts, adds up the softmax's sums within threads until the tile ends, deals shorter chains to the last
thread blocks, and spills no register. Kernel time, medians of 12 (128K) and 24 (16K) calls in bursts of 4 and 8, the
versions in turn, of which the first bursts shared the GPU with other processes:

| | vertical-slash 128K | A-shape 128K | vertical-slash 16K | A-shape 16K |
|---|---|---|---|---|
| version 6 | 25.9 ms | 19.1 ms | 2.69 ms | 2.19 ms |
| version 7 | 25.3 ms | 18.6 ms | 2.59 ms | 2.16 ms |

Another run called each variant once in every round, dense attention first, so that the later ones met a cooler GPU. At
128K, in this order: version 6 27.5 ms; version 7 with turns and equal tiles of 4 heads side by side 26.4; with turns
25.5; as the second with 2 of 16 exponentials as polynomials 25.8; as the second without turns 25.1.
At head_dim 64 that run took 18.9 ms with version 6 and 17.7, 17.9 and 17.3 with none, 4 and 2 of 16 exponentials as
polynomials. At 16K, 4, 8 and 32 heads side by side were alike (2.60 ms); the heads stay in order. Power is the limit:
the first call of a burst at 128K takes 23.0 ms, the third 25.3. The GPU of these runs was slower for every version than
that of version 6's 25.1, where cuDNN took the same 237 ms.

Version 8 lets a row's running maximum follow its scores only when they exceed it by 2**8, decided by a vote of each
warp: nearly no step rescales its sums any more, which stood between the value product and the next one. The warpgroup
that loads is one warp; the other three repeated its instructions. Bias rows come by TMA beside their keys; before, the
read from device memory held up the release of the keys. A plan without bands has chains of 1. Plans can promise
clean lists, and then a third fewer kernels prepare them. Kernel time at 128K, the versions in turn, bursts of 4, last
two of each (dense attention 238.8 ms; the bias still as in version 7):

| | vertical-slash | block-sparse | A-shape |
|---|---|---|---|
| version 7 | 25.6 ms | 25.3 ms | 18.9 ms |
| lazy maxima | 24.0 ms | 23.6 ms | 19.0 ms |
| one loading warp | 25.2 ms | 22.9 ms | 18.8 ms |
| both | 23.9 ms | 22.5 ms | 18.9 ms |
| both, chains of 2 | 24.0 ms | 22.6 ms | |
| both, chains of 1 | 24.2 ms | 21.4 ms | 19.1 ms |

What was left out to see what it costs, in version 7 (dense 233 ms; wrong results): the bias 23.2 ms vertical-slash and
17.8 A-shape; the second copy for each row of 128 elements 24.5 ms. Queries held in registers instead of shared memory
spill 330 bytes.

From jax 0.12 on nvJitLink assembles the kernel and ignores `setmaxnreg`: 608 bytes are spilled and the products wait
for each other (C7512). `serial` serves there, which spills nothing. Kernel time at 128K, a quarter of a second
of each form in turn, once (dense 238.5 ms):

| | vertical-slash | block-sparse | A-shape |
|---|---|---|---|
| version 8, jax 0.12.0.1 | 30.7 ms | 28.4 ms | |
| `serial`, jax 0.12.0.1 | 25.3 ms | 24.8 ms | 20.3 ms |
| version 8, jax 0.11.2 | 25.8 ms | 21.3 ms | 19.4 ms |

Preparing a clean plan takes 110 us of the GPU for vertical-slash at 128K, 80 for A-shape and 13 for block-sparse; half
of it writes the bias.

Starting tiles anywhere takes a copy for each 128 bytes of a row, and cost version 6 2 to 3 % of the rate where every
band is a multiple of the tile: such plans (`band_multiple`) keep whole-row copies. In a run of minutes version 5 took
30.1 ms of kernel time and version 6 27.3. A mask for the band that key 0 cuts, computed in registers, cost a third more
instructions in every column step; it is part of the bias instead.

cuDNN's dense kernel took 235 ms rested and 252 steady in the runs of 2 and 5. No gain: `unsafe_no_auto_barriers` (-0.7
% to +1 %), 240 instead of 232 registers, three stages, hardware named barriers instead of mbarriers for the turns (+-1
%), chains of 2 or 8, one contiguous array per KV head (within the noise). Deciding version 8's vote by the bits of the
scores, three to an instruction (9 % fewer instructions a step), made vertical-slash 1.7 % faster, block-sparse 2.7 %
and A-shape 3.9 % slower. Turns between the compute warpgroups were worth 7 % in versions 1 and 2, in version 3 2 % at
16K and nothing at 128K; version 7 was 2 % faster without, and version 8 has none.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import tables as hopper_tables
from pallas_kernels.device import Device
from pallas_kernels.hopper.assembler import ignores_setmaxnreg
from pallas_kernels.hopper.config import HEAD_DIMS, KernelConfig
from pallas_kernels.hopper.kernel import kernel_body
from pallas_kernels.hopper.launch import Launch, Refs, scratch_types
from pallas_kernels.plan import SparsePlan, kv_limit
from pallas_kernels.plan_builders import full_plan
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE, num_query_tiles
from pallas_kernels.tracing import under_own_settings
from pallas_kernels.xla.backward import attention_backward

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
    static tuning, by default the fastest measured; `interpret`: parameters of the Mosaic GPU interpreter, to run on a
    CPU.

    **Returns:** the output in q's dtype, zero at rows at or past a sequence's length; and with `return_lse` the
    log-sum-exp (natural logarithm, float32 `[b, t, n]`, −inf where the output is zero), without it None.

    Padding rows of k and v may hold any finite values. Differentiable in q, k and v: the backward pass is
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
    if config is None:
        # Without bands neighbouring query tiles share no keys: nothing to keep them together for.
        config = KernelConfig(chain=1 if plan.bands is None else KernelConfig.chain, overlap=not ignores_setmaxnreg())
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


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attention(q, k, v, plan, lengths, q_offset, scale, return_lse, config, interpret):
    tables = hopper_tables.prepare(plan, q, k, v, lengths=lengths, q_offset=q_offset)
    aligned = plan.bands is None or plan.band_multiple % KEY_TILE == 0
    options = {"scale": scale, "return_lse": return_lse, "config": config, "interpret": interpret}
    return attend_prepared(q, k, v, tables, aligned=aligned, **options)


@under_own_settings
def _forward(q, k, v, plan, lengths, q_offset, scale, return_lse, config, interpret):
    out, lse = _attention(q, k, v, plan, lengths, q_offset, scale, True, config, interpret)  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse if return_lse else None), (q, k, v, plan, lengths, q_offset, out, lse)


@under_own_settings
def _backward(
    scale: float, return_lse: bool, config: KernelConfig, interpret: Any, saved: Any, cotangents: Any
) -> tuple[Any, ...]:
    q, k, v, plan, lengths, q_offset, out, lse = saved
    d_out, d_lse = cotangents
    d_lse = d_lse if return_lse else jnp.zeros_like(lse)
    limit = kv_limit(lengths, q.shape[0], k.shape[1])
    d_q, d_k, d_v = attention_backward(q, k, v, plan, limit, q_offset, out, lse, d_out, d_lse, scale=scale)
    return d_q, d_k, d_v, None, None, None


_attention.defvjp(_forward, _backward)


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

    outputs = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types(launch, return_lse),
        grid=(rounds.thread_blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="sparse_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(*inputs.values())
    if not return_lse:
        return outputs[0][:, :t], None
    return outputs[0][:, :t], outputs[1].reshape(b, n, -1)[:, :, :t].transpose(0, 2, 1)


def _pad_rows(x: Float[Array, "b t n h"]) -> Float[Array, "b T n h"]:
    """Zero rows up to a multiple of 8, the row tiling of swizzled TMA copies. Free where there is nothing to pad."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))
