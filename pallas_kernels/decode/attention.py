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
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import check_scale, check_whole, clamped, integer_lengths
from pallas_kernels.decode.narrow import moved
from pallas_kernels.decode.split import MIN_ROWS, split_attention, tile_of
from pallas_kernels.device import Device

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
    checked = integer_lengths(lengths, q.shape[0])
    if checked.dtype != jnp.int32:
        checked = clamped(checked, 0, k.shape[2])
    if not isinstance(layer, jax.Array) and check_whole("layer", layer, 0) >= k.shape[0]:
        raise ValueError(f"layer must be less than the {k.shape[0]} layers of k, got {layer}")
    arguments = (q, k, v, k_scale, v_scale, jnp.asarray(layer, jnp.int32), checked)
    kernel = partial(_addressable, scale=factor, interpret=interpret)
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
    if k.shape[2] < tile_of(k):
        return f"the kernel needs a cache of at least {tile_of(k)} keys; it has {k.shape[2]}"
    if _wraps(k.dtype, k.size // k.shape[0]):
        return f"a layer of 2**31 to 2**32 one-byte numbers is addressed with 32 bits; it has {k.size // k.shape[0]:,}"
    return None


def _wraps(dtype: Any, size: int) -> bool:
    """Whether offsets overflow: Pallas's Triton lowering counts bytes, and has signed 32 bits for up to 2**32."""
    return jnp.dtype(dtype).itemsize == 1 and 2**31 < size <= 2**32


def _addressable(q, k, v, k_scale, v_scale, layer, lengths, **options: Any) -> tuple[Array, Array]:
    """The kernel, on what it can address."""
    if _wraps(k.dtype, k.size):  # so the layer is copied out: three bytes moved for one, on caches of 2 to 4 GiB only
        layer = jnp.clip(layer, 0, k.shape[0] - 1)
        k, v, k_scale, v_scale = (jax.lax.dynamic_index_in_dim(x, layer) for x in (k, v, k_scale, v_scale))
        layer = jnp.int32(0)
    return split_attention(q, k, v, k_scale, v_scale, layer, lengths, **options)


def _plain_attention(q, k, v, k_scale, v_scale, layer, lengths, *, scale: float) -> tuple[Array, Array]:
    b, n, h = q.shape
    layer, lengths = jnp.clip(layer, 0, k.shape[0] - 1), jnp.clip(lengths, 0, k.shape[2])
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
