"""One new row a sequence: queries and keys rotated, keys and values put into the cache, in one launch and in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int


def rotate_and_append(
    q: Float[Array, "b n h"],
    k: Float[Array, "b k h"],
    v: Float[Array, "b k h"],
    cos: Float[Array, "layers b r"],
    sin: Float[Array, "layers b r"],
    growth: Float[Array, "layers b"] | None,
    k_cache: Float[Array, "layers b s k h"],
    v_cache: Float[Array, "layers b s k h"],
    layer: Int[Array, ""],
    positions: Int[Array, " b"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b n h"], Float[Array, "layers b s k h"], Float[Array, "layers b s k h"]]:
    """Rotates a query and a key of each sequence, and puts key and value at their position of one layer's cache.

    Dimensions j and j + h/2 of a head are a pair, turned by its angle in float32.

    **Arguments:**

    - `q`, `k`, `v`: in the cache's dtype, of 16 bits; h is a power of two from 16 on.
    - `cos`, `sin`: float32, of each layer and sequence; r = h/2. `growth`: what queries are multiplied by, if anything.
    - `k_cache`, `v_cache`: of all layers; given up for the results.
    - `layer`: int32 scalar, one of the layers. `positions`: int32, from 0 on; one past the cache writes nothing.
    - `interpret` (static): run the kernel on a CPU, for tests.

    **Returns:** the rotated queries, and the caches.

    **Raises:** ValueError for what does not fit, with the reason that `unsupported_reason` gives.
    """
    reason = unsupported_reason(q, cos, k_cache)
    if reason is not None:
        raise ValueError(f"rotate_and_append: {reason}")
    (b, n, h), (layers, _, _, kv_heads, _) = q.shape, k_cache.shape
    shapes = {"k": (b, kv_heads, h), "v": (b, kv_heads, h), "v_cache": (layers, b, k_cache.shape[2], kv_heads, h)}
    for name, x in {"k": k, "v": v, "v_cache": v_cache}.items():
        if x.shape != shapes[name] or x.dtype != q.dtype:
            raise ValueError(f"rotate_and_append: {name} must be {q.dtype} {shapes[name]}, got {x.dtype} {x.shape}")
    inputs = (layer[None], positions, q, k, v, cos, sin, *(() if growth is None else (growth,)), k_cache, v_cache)
    return pl.pallas_call(
        partial(_kernel, scaled=growth is not None),
        grid=(n + 2 * kv_heads, b),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k_cache, v_cache)],
        input_output_aliases={len(inputs) - 2: 1, len(inputs) - 1: 2},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="rotate_and_append",
    )(*inputs)


def unsupported_reason(q: Float[Array, "b n h"], cos: Float[Array, "layers b r"], cache: Array) -> str | None:
    """Why the kernel can't serve a call, in words; None if it can."""
    h = q.shape[-1]
    if q.dtype != cache.dtype or q.dtype.itemsize != 2:
        return f"queries and cache must have one dtype of 16 bits, got {q.dtype} and {cache.dtype}"
    if h < 16 or h & (h - 1) or 2 * cos.shape[-1] != h:
        return f"all of a head is rotated, a power of two from 16 on; got {2 * cos.shape[-1]} of {h}"
    if q.size == 0:
        return f"there is nothing in queries of shape {q.shape}"
    if cache.shape[1::3] != q.shape[::2] or cos.shape[:2] != cache.shape[:2]:
        return f"q {q.shape} and cos {cos.shape} do not fit k_cache {cache.shape}"
    return None


def _kernel(layer_ref, positions_ref, q_ref, k_ref, v_ref, cos_ref, sin_ref, *refs, scaled: bool) -> None:
    q_out_ref, k_cache_ref, v_cache_ref = refs[-3:]
    program, batch = pl.program_id(0), pl.program_id(1)
    (n, h), kv_heads = q_ref.shape[1:], k_ref.shape[1]
    layer, position = layer_ref[0], positions_ref[batch]
    fits = position < k_cache_ref.shape[2]
    halves = pl.ds(0, h // 2), pl.ds(h // 2, h // 2)

    def turned(ref: Any, head: Any) -> tuple[Array, Array]:
        first, second = (ref[batch, head, half].astype(jnp.float32) for half in halves)
        cos, sin = cos_ref[layer, batch], sin_ref[layer, batch]
        return first * cos - second * sin, second * cos + first * sin

    @pl.when(program < n)
    def _():
        for half, x in zip(halves, turned(q_ref, program), strict=True):
            x = x * refs[0][layer, batch] if scaled else x
            q_out_ref[batch, program, half] = x.astype(q_out_ref.dtype)

    @pl.when((program >= n) & (program < n + kv_heads) & fits)
    def _():
        for half, x in zip(halves, turned(k_ref, program - n), strict=True):
            k_cache_ref[layer, batch, position, program - n, half] = x.astype(k_cache_ref.dtype)

    @pl.when((program >= n + kv_heads) & fits)
    def _():
        head = program - n - kv_heads
        v_cache_ref[layer, batch, position, head] = v_ref[batch, head]
