"""Decode attention: one query a sequence against a long cache, split over the keys so that a whole GPU reads it.

Each thread block takes one KV head of one sequence and a share of its keys, and multiplies them with all query heads of
the group at once: every key and value is read once, straight from the stacked cache of all layers (no copy of a layer,
no dequantized copy). The shares' results are merged by their log-sum-exp, as in FlashDecoding.

Cost: the bytes of the valid keys and values; arithmetic hides behind them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import check_lengths, check_scale, check_whole
from pallas_kernels.decode.narrow import moved
from pallas_kernels.device import Device

BLOCKS = 528
"""Thread blocks to aim at: four for each multiprocessor of an H100 or H200, of which two run at a time."""

MIN_ROWS = 16
"""Rows of the smallest tensor-core product; groups of fewer query heads are padded to it."""

UNITS = 2.0**14
"""A weight of one, in float16 products with quantized values: weights down to 4e-12 of it still count."""

DecodeImplementation = Literal["triton", "xla"]


def decode_attention(
    q: Float[Array, "b n h"],
    k: Array,
    v: Array,
    layer: int | Int[Array, ""],
    lengths: Int[Array, " b"],
    *,
    k_scale: Float[Array, "layers b s k"] | None = None,
    v_scale: Float[Array, "layers b s k"] | None = None,
    scale: float | None = None,
    implementation: DecodeImplementation | None = None,
    interpret: bool = False,
    return_lse: bool = False,
) -> Any:
    """Dense attention of one query for each sequence to the first keys of one layer's cache.

    The cache is that of all layers, stacked; the kernel reads the layer where it lies.

    **Arguments:**

    - `q`: `[b, n, h]`, the query of each sequence.
    - `k`, `v`: `[layers, b, s, k, h]`, n a multiple of k. In q's dtype, or in float8_e4m3fn or int8 with scales.
    - `layer`: int32 scalar; a traced one is clamped to the layers there are.
    - `lengths`: int32 `[b]`, keys of each sequence, clamped to [0, s]. A sequence without keys gives zeros. Rows of the
      cache at or past a length may hold any finite numbers.
    - `k_scale`, `v_scale`: `[layers, b, s, k]`, what each row of k and v is to be multiplied with; None in q's dtype.
    - `scale` (static): of the scores, by default 1/sqrt(h).
    - `implementation` (static): "triton", a kernel for NVIDIA GPUs; "xla", plain jnp, everywhere; None, the best for
      this call. The kernel wants 16-bit q, h a power of two from 16 on, s of at least 64 keys (128 with one-byte
      numbers), and for float8_e4m3fn compute capability 8.9.
    - `interpret` (static): run the kernel on a CPU, for tests.
    - `return_lse` (static): also return the log-sum-exp of the scores.

    **Returns:** `[b, n, h]` in q's dtype, with float32 softmax; with `return_lse` the pair of that and float32
    `[b, n]`, natural logarithm, −inf for a sequence without keys.

    **Raises:** ValueError for shapes, dtypes and numbers that do not fit, and for an implementation that cannot serve
    the call, with the reason; TypeError for lengths or a layer that are no integers.

    Cost: the bytes of the valid keys and values, read once. Source: FlashDecoding, for the split over keys.
    """
    if k.ndim != 5 or k.shape != v.shape or q.ndim != 3 or q.shape[::2] != k.shape[1::3] or q.shape[1] % k.shape[3]:
        raise ValueError(f"decode_attention: q {q.shape} does not fit k {k.shape} and v {v.shape}")
    if (k_scale is None) != (v_scale is None) or (k_scale is not None and k_scale.shape != k.shape[:-1]):
        raise ValueError(f"decode_attention: k_scale and v_scale must both have shape {k.shape[:-1]}, or be None")
    if k.dtype != v.dtype or (k_scale is None and k.dtype != q.dtype):
        raise ValueError(f"decode_attention: k is {k.dtype} and v {v.dtype}; without scales both have q's {q.dtype}")
    factor = check_scale(scale, q)
    checked = check_lengths(lengths, q.shape[0], k.shape[2])
    if not isinstance(layer, jax.Array) and check_whole("layer", layer, 0) >= k.shape[0]:
        raise ValueError(f"layer must be less than the {k.shape[0]} layers of k, got {layer}")
    layer = jnp.clip(jnp.asarray(layer, jnp.int32), 0, k.shape[0] - 1)
    arguments = (q, k, v, k_scale, v_scale, layer, checked)
    kernel = partial(_split_attention, scale=factor, interpret=interpret)
    plain = partial(_plain_attention, scale=factor)
    reason = unsupported_reason(q, k)
    if implementation is None:
        if reason is not None:
            found = plain(*arguments)
        else:
            found = jax.lax.platform_dependent(*arguments, cuda=kernel, default=plain)
        return found if return_lse else found[0]
    forms = {"triton": (kernel, reason), "xla": (plain, None)}
    if implementation not in forms:
        raise ValueError(f'implementation must be None, "triton" or "xla", got {implementation!r}')
    run, reason = forms[implementation]
    if reason is not None:
        raise ValueError(f'implementation="{implementation}" cannot serve this call: {reason}')
    found = run(*arguments)
    return found if return_lse else found[0]


def unsupported_reason(q: Float[Array, "b n h"], k: Array) -> str | None:
    """Why the kernel can't serve a call, in words; None if it can.

    It looks at shapes and dtypes only, and for 8-bit floats at the device: without instructions for them the compiler
    aborts.
    """
    h = q.shape[-1]
    if k.dtype == jnp.float8_e4m3fn and (reason := Device.default().reason_against_fp8()) is not None:
        return reason
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel computes in bfloat16 or float16; q is {q.dtype}"
    if h < MIN_ROWS or h & (h - 1):
        return f"the kernel needs a head_dim that is a power of two from 16 on; it is {h}"
    if k.shape[2] < _tile(k):
        return f"the kernel needs a cache of at least {_tile(k)} keys; it has {k.shape[2]}"
    if _wraps(k.dtype, k.size // k.shape[0]):
        return f"a layer of 2**31 to 2**32 one-byte numbers is addressed with 32 bits; it has {k.size // k.shape[0]:,}"
    return None


def _wraps(dtype: Any, size: int) -> bool:
    """Whether offsets overflow: Pallas's Triton lowering counts bytes, and has signed 32 bits for up to 2**32."""
    return jnp.dtype(dtype).itemsize == 1 and 2**31 < size <= 2**32


def _tile(k: Array) -> int:
    """Keys that a thread block loads at a time: 16 KB for head_dim 128."""
    return 128 if k.dtype.itemsize == 1 else 64


def _plain_attention(q, k, v, k_scale, v_scale, layer, lengths, *, scale: float) -> tuple[Array, Array]:
    b, n, h = q.shape
    k, v = (moved(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), x) for x in (k, v))
    if k_scale is not None:
        k_scale, v_scale = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k_scale, v_scale))
        k, v = (dequantize(x, s, q.dtype) for x, s in ((k, k_scale), (v, v_scale)))
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = q.reshape(b, k.shape[2], n // k.shape[2], h)
    scores = jnp.einsum("bkgh,bskh->bkgs", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    valid = (jnp.arange(k.shape[1], dtype=jnp.int32) < lengths[:, None])[:, None, None]
    top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min, where=valid)
    weights = jnp.where(valid, jnp.exp(scores - top), 0)
    total = weights.sum(-1, keepdims=True)
    lse = (top + jnp.log(total)).reshape(b, n)
    weights = (weights / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).astype(v.dtype)
    out = jnp.einsum("bkgs,bskh->bkgh", weights, v, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(b, n, h).astype(q.dtype), lse


def dequantize(x: Array, scale: Float[Array, "*rows"], dtype: Any) -> Float[Array, "*rows h"]:
    """x times the factor of each row, in `dtype`."""
    return (x.astype(jnp.float32) * scale[..., None].astype(jnp.float32)).astype(dtype)


def _split_attention(
    q, k, v, k_scale, v_scale, layer, lengths, *, scale: float, interpret: bool, warps: int = 4, stages: int = 3
) -> tuple[Array, Array]:
    b, n, h = q.shape
    s, kv_heads = k.shape[2:4]
    if _wraps(k.dtype, k.size):  # so the layer is copied out: three bytes moved for one, on caches of 2 to 4 GiB only
        k, v, k_scale, v_scale = (jax.lax.dynamic_index_in_dim(x, layer) for x in (k, v, k_scale, v_scale))
        layer = jnp.int32(0)
    group = n // kv_heads
    rows = max(MIN_ROWS, pl.next_power_of_2(group))
    dtype = q.dtype
    q = jnp.pad(q.reshape(b, kv_heads, group, h), ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    factor = jnp.full((b, kv_heads, rows), scale, jnp.float32)
    scales = [] if k_scale is None else [k_scale, v_scale]
    if scales:
        # GPUs turn e4m3 into float16 in one instruction, into bfloat16 in many. Queries are brought into its range.
        size = jnp.max(jnp.abs(q.astype(jnp.float32)), axis=-1)
        q = (q.astype(jnp.float32) / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)[..., None]).astype(jnp.float16)
        factor = factor * size
    tile = _tile(k)
    splits = max(1, min(BLOCKS // (b * kv_heads), s // tile))
    out, top, total = pl.pallas_call(
        partial(_kernel, tile=tile, quantized=bool(scales)),
        grid=(kv_heads, splits, b),
        out_shape=[
            jax.ShapeDtypeStruct((b, kv_heads, splits, rows, h), jnp.float32),
            jax.ShapeDtypeStruct((b, kv_heads, splits, rows), jnp.float32),
            jax.ShapeDtypeStruct((b, kv_heads, splits, rows), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="decode_attention",
    )(layer[None], lengths, q, factor, k, v, *scales)
    best = jnp.max(top, axis=2, keepdims=True)
    weight = jnp.where(total > 0, jnp.exp(top - best), 0)
    whole = jnp.sum(total * weight, axis=2)
    lse = best[:, :, 0] + jnp.log(whole)
    merged = jnp.sum(out * weight[..., None], axis=2) / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)[..., None]
    return merged[:, :, :group].reshape(b, n, h).astype(dtype), lse[:, :, :group].reshape(b, n)


def _kernel(layer_ref, lengths_ref, q_ref, factor_ref, k_ref, v_ref, *refs, tile: int, quantized: bool) -> None:
    scale_refs, (out_ref, top_ref, total_ref) = refs[:-3], refs[-3:]
    head, split, batch = (pl.program_id(axis) for axis in range(3))
    layer, length, s = layer_ref[0], lengths_ref[batch], k_ref.shape[2]
    tiles = pl.cdiv(length, tile)
    share = pl.cdiv(tiles, pl.num_programs(1))
    q, factor = q_ref[batch, head], factor_ref[batch, head][:, None]
    lowest = jnp.finfo(jnp.float32).min

    def step(index, state):
        out, top, total = state
        # The last tile of a cache that is no multiple of it begins early; rows seen before are masked.
        intended = index * tile
        first = jnp.minimum(intended, s - tile)
        position = first + jnp.arange(tile, dtype=jnp.int32)
        seen = ((position >= intended) & (position < length))[None]
        keys = k_ref[layer, batch, pl.ds(first, tile), head].astype(q.dtype)
        scores = plgpu.dot(q, keys.T) * factor
        if quantized:
            scores *= scale_refs[0][layer, batch, pl.ds(first, tile), head].astype(jnp.float32)[None]
        scores = jnp.where(seen, scores, lowest)
        higher = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.where(seen, jnp.exp(scores - higher[:, None]), 0)
        keep = jnp.exp(top - higher)
        total = total * keep + weights.sum(axis=1)
        values = v_ref[layer, batch, pl.ds(first, tile), head].astype(q.dtype)
        if not quantized:
            return out * keep[:, None] + plgpu.dot(weights.astype(q.dtype), values), higher, total
        # Weights times factors, in units that leave float16 its full range below the largest.
        sizes = scale_refs[1][layer, batch, pl.ds(first, tile), head].astype(jnp.float32)[None]
        sizes = jnp.where(seen, sizes, 0)
        unit = jnp.maximum(jnp.max(sizes) / UNITS, jnp.finfo(jnp.float32).tiny)
        part = plgpu.dot((weights * (sizes / unit)).astype(q.dtype), values)
        return out * keep[:, None] + part * unit, higher, total

    rows = q.shape[0]
    state = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((rows,), lowest, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    out, top, total = jax.lax.fori_loop(split * share, jnp.minimum((split + 1) * share, tiles), step, state)
    out_ref[batch, head, split] = out
    top_ref[batch, head, split] = top
    total_ref[batch, head, split] = total
