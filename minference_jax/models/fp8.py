"""Projections in FP8 (e4m3): weights with a scale for each output channel, activations with one for each token.

A product of quantized rows x̂ = x / s and weights ŵ = w / c is s · c · (x̂ ŵᵀ): the scales leave the sum, so the matrix
product itself runs on plain e4m3 numbers (XLA hands it to cuBLASLt, at twice the rate of bfloat16 on Hopper and
later GPUs), and the rescaling joins the elementwise work that follows.

e4m3 has three bits of mantissa: each number is rounded by up to 6 %, 2.6 % in the mean. The errors of the two sides
are independent, so a projection ends 3.6 % from the exact one (as a ratio of norms): logits move a little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn

from minference_jax.models.chunks import Apart, Slice, plain
from pallas_kernels.device import Device
from pallas_kernels.rows.launch import DTYPE, LARGEST, RowRange, unsupported_reason
from pallas_kernels.rows.quantize import quantized_rows
from pallas_kernels.tracing import on_gpus

CONTRACTED = {
    "wq": 1,
    "wk": 1,
    "wv": 1,
    "wo": 2,
    "w_gate": 1,
    "w_up": 1,
    "w_down": 1,
    "shared_gate": 1,
    "shared_up": 1,
    "shared_down": 1,
    "expert_gate": 1,
    "expert_up": 1,
    "expert_down": 1,
}
"""The projections of a layer, and how many axes of their weights are summed over: the first ones after those of layers
and of experts."""


def _leading(name: str) -> int:
    """How many axes of a stacked weight come before those of the matrix: layers, and experts where it has them."""
    return 2 if name.startswith("expert_") else 1


def quantize(
    x: Float[Array, "*rows i"],
) -> tuple[Float8e4m3fn[Array, "*rows i"], Float[Array, "*rows"]]:
    """x as e4m3 numbers and float32 scales, one for each row: x ≈ numbers · scale. A row of zeros has scale 0."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST
    # The inverse of a subnormal scale is infinite: such a row (below 5e-36) is one of zeros, on every device.
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0, scale)
    inverse = jnp.where(scale > 0, 1 / scale, 0)
    return (x * inverse[..., None]).astype(DTYPE), scale


class Rows(NamedTuple):
    """Quantized rows x ≈ numbers · scale, and the dtype of x, which their products are to have."""

    numbers: Float8e4m3fn[Array, "*rows i"]
    scale: Float[Array, "*rows"]
    dtype: Any


def rows_of(x: Float[Array, "*rows i"] | Slice | Apart) -> Rows:
    """x, quantized: on GPUs in one pass."""
    return quantized(quantized_rows, lambda x: x, x)


def quantized(
    kernel: Callable[..., Any], value: Callable[..., Array], x: Float[Array, "*rows i"] | Slice | Apart, *others: Array
) -> Rows:
    """`value(x, *others)`, quantized, by `either`."""
    numbers, scale = either(kernel, lambda *arrays: quantize(value(*arrays)), x, *others)
    return Rows(numbers, scale, plain(x).dtype)


def either(
    kernel: Callable[..., Any], chain: Callable[..., Any], x: Float[Array, "*rows i"] | Slice | Apart, *others: Array
) -> tuple[Array, ...]:
    """`chain(x, *others)` in jnp, or on a GPU that can `kernel(x, *others)`, which does the same in one pass.

    Both take x as `[rows, i]`, and return arrays with such rows, which then have x's axes; a part of a longer array
    `[b, t, i]`, or rows that lie apart, the kernel takes from where they lie, by its own `part`. Derivatives are those
    of the chain.
    """
    given, place = plain(x), None
    if isinstance(x, Slice):
        place = x.whole, x.start, None
    elif isinstance(x, Apart):
        place = tuple(s.whole for s in x.slices), jnp.stack([s.start for s in x.slices]), x.groups
    rows = given.reshape(-1, given.shape[-1])

    def unfused(rows: Array, source: Any, *others: Array) -> Any:
        return chain(rows, *others)

    def fused(rows: Array, source: Any, *others: Array) -> Any:
        if source is None:
            return kernel(rows, *others)
        whole, start, groups = source
        return kernel(whole, *others, part=RowRange(start, given.shape[1], groups))

    run = on_gpus(fused, unfused) if unsupported_reason(rows) is None else unfused
    return tuple(y.reshape(*given.shape[:-1], *y.shape[1:]) for y in run(rows, place, *others))


def product(
    rows: Rows, weight: Float8e4m3fn[Array, "*out *in"], channel_scale: Float[Array, "*out"]
) -> Float[Array, "*rows *out"]:
    """Quantized rows times quantized weights, scales applied; i is the product of the weight's `in` axes."""
    y = rescaled(unscaled(rows, weight), rows.scale.reshape(-1), channel_scale.reshape(-1), rows.dtype)
    return y.reshape(*rows.scale.shape, *channel_scale.shape)


def rescaled(
    y: Float[Array, "m o"], row_scale: Float[Array, " m"], channel_scale: Float[Array, " o"], dtype: Any
) -> Float[Array, "m o"]:
    """A product of plain e4m3 numbers with its scales, in `dtype`."""
    return (y.astype(jnp.float32) * row_scale[:, None] * channel_scale[None]).astype(dtype)


def unscaled(rows: Rows, weight: Float8e4m3fn[Array, "*out *in"]) -> Float[Array, "m o"]:
    """The product of plain e4m3 numbers; m and o are the products of the rows' axes and of the weight's `out` axes.

    On a GPU an e4m3 matrix product, from compute capability 8.9 on; before, the same numbers in bfloat16, which holds
    them exactly (half the memory, no faster); elsewhere in float32. Sums of e4m3 products exceed float16, so a float16
    model has them in float32 until they are scaled.
    """
    inside = rows.numbers.shape[-1]
    flat_x, flat_w = rows.numbers.reshape(-1, inside), weight.reshape(-1, inside)
    contract = (((1,), (1,)), ((), ()))
    wide = jnp.bfloat16 if rows.dtype == jnp.bfloat16 else jnp.float32

    def narrow_product(x: Array, w: Array) -> Array:
        if Device.default().reason_against_fp8() is not None:
            x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
        return jax.lax.dot_general(x, w, contract, preferred_element_type=wide)

    def wide_product(x: Array, w: Array) -> Array:
        return jax.lax.dot_general(x.astype(jnp.float32), w.astype(jnp.float32), contract).astype(wide)

    return jax.lax.platform_dependent(flat_x, flat_w, cuda=narrow_product, default=wide_product)


@partial(jax.jit, static_argnames="contracted")
def quantize_weight(
    weight: Float[Array, "layers ..."], contracted: int
) -> tuple[Float8e4m3fn[Array, "layers ..."], Float[Array, "layers ..."]]:
    """Stacked weights `[layers, *in, *out]` as e4m3 `[layers, *out, *in]` and scales `[layers, *out]`, layer by layer.

    The summed axes come last: FP8 matrix products want both operands so.
    """
    shape = weight.shape[1:]
    inside, out = shape[:contracted], shape[contracted:]

    def one(w: Array) -> tuple[Array, Array]:
        numbers, scale = quantize(w.reshape(math.prod(inside), -1).T)
        return numbers.reshape(*out, *inside), scale.reshape(out)

    return jax.lax.map(one, weight)


def quantize_params(params: Mapping[str, Array]) -> dict[str, Array]:
    """All parameters with the layers' projections in FP8, each with its scales as `<name>_scale`.

    Embeddings, head, norms and biases stay as they are (and are shared). Already quantized parameters pass unchanged.
    """
    result: dict[str, Array] = {}
    for name, value in params.items():
        result |= quantize_param(name, value)
    return result


def quantize_param(name: str, value: Array) -> dict[str, Array]:
    """One parameter as `quantize_params` has it: a projection as two arrays, anything else as it is."""
    leaf = name.removeprefix("layers.")
    if leaf not in CONTRACTED or value.dtype == DTYPE:
        return {name: value}
    before = value.shape[: _leading(leaf)]
    found = quantize_weight(value.reshape(-1, *value.shape[len(before) :]), CONTRACTED[leaf])
    numbers, scale = (x.reshape(*before, *x.shape[1:]) for x in found)
    return {name: numbers, f"{name}_scale": scale}


def fp8_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What `quantize_params` makes of parameters of these shapes."""
    result = {}
    for name, shape in shapes.items():
        leaf = name.removeprefix("layers.")
        result[name] = shape
        if leaf in CONTRACTED:
            before, matrix = shape[: _leading(leaf)], shape[_leading(leaf) :]
            inside, out = matrix[: CONTRACTED[leaf]], matrix[CONTRACTED[leaf] :]
            result[name] = (*before, *out, *inside)
            result[f"{name}_scale"] = (*before, *out)
    return result
