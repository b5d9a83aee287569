"""Sparse attention on every NVIDIA GPU since Ampere: the wrapper around the warp-level Mosaic GPU kernel."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import tables as kernel_tables
from pallas_kernels.mma.config import TMA_CAPABILITY, KernelConfig, default_config
from pallas_kernels.mma.kernel import kernel_body
from pallas_kernels.mma.launch import Launch, Refs, scratch_types
from pallas_kernels.plan import SparsePlan
from pallas_kernels.sizes import KEY_TILE, QUERY_TILE, num_query_tiles


def target_capability() -> tuple[int, int]:
    """The compute capability that kernels are lowered for: the default device's, or 9.0 where there is no GPU.

    Mosaic decides the same way which form of a copy it makes.
    """
    return mgpu_utils._infer_arch()  # pyright: ignore[reportPrivateUsage]


def mma_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    plan: SparsePlan,
    *,
    lengths: Int[Array, " b"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    return_lse: bool = False,
    config: KernelConfig | None = None,
    interpret: Any = None,
) -> Float[Array, "b t n h"] | tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    capability = target_capability()
    config = config or default_config(q.shape[-1], capability)
    limits = None if lengths is None else lengths.astype(jnp.int32)
    offset = jnp.asarray(q_offset, jnp.int32)
    outputs: Any = _attention(q, k, v, plan, limits, offset, scale, return_lse, config, interpret)
    return outputs if return_lse else outputs[0]


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
    tma = target_capability() >= TMA_CAPABILITY
    launch = Launch(
        config=config,
        heads=n,
        kv_heads=k.shape[2],
        query_tiles=num_query_tiles(t),
        head_dim=h,
        scale=scale,
        dtype=q.dtype,
        tma=tma,
        emulate=interpret is not None,
    )
    # Results are stored by whole query tiles. cp.async reads whole key tiles too; TMA fills in what lies past the end.
    multiple = 8 if tma else QUERY_TILE
    q = _pad_rows(q, QUERY_TILE)
    k, v = (_pad_rows(x, multiple) for x in (k, v))
    inputs = {"q": q, "k": k, "v": v} | {f.name: getattr(tables, f.name) for f in dataclasses.fields(tables)}
    inputs = {name: array for name, array in inputs.items() if array is not None}
    for name in ("keys", "values"):
        if name in inputs and not tma:
            inputs[name] = _pad_rows(inputs[name], KEY_TILE)
    out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if return_lse:
        out_type.append(jax.ShapeDtypeStruct((b * n, q.shape[1]), jnp.float32))

    def body(*refs, **scratch):
        named = dict(zip([*inputs, "out", "lse"], refs, strict=False))
        kernel_body(launch, Refs(**{f.name: named.get(f.name) for f in dataclasses.fields(Refs)}), scratch)

    outputs = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types(launch),
        grid=(b * n, launch.query_tiles * launch.blocks_per_tile),
        grid_names=("head", "block"),
        interpret=interpret,
        kernel_name="sparse_attention_mma",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(*inputs.values())
    if not return_lse:
        return outputs[0][:, :t], None
    return outputs[0][:, :t], outputs[1].reshape(b, n, -1)[:, :, :t].transpose(0, 2, 1)


def _pad_rows(x: Float[Array, "b t *w"], multiple: int) -> Float[Array, "b T *w"]:
    """Zero rows up to a multiple. Free where there is nothing to pad."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))
