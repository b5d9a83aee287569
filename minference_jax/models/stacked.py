"""A layer's parameters: a mapping name → array, as `params.layer_shapes` lists them, or a view of stacked ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from minference_jax.models import fp8
from pallas_kernels.decode.matvec import stacked_matvec, unsupported_reason
from pallas_kernels.rows.quantize import Activation

Layer = Mapping[str, Array]

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


class StackedLayer(Mapping[str, Array]):
    """One layer of stacked parameters `[layers, …]`, sliced when asked for.

    Decoding multiplies single rows with every weight; `project` then reads the stack itself, without the slice.
    """

    def __init__(self, stacked: Layer, index: Int32[Array, ""]):
        self.stacked, self.index = stacked, index

    def __getitem__(self, name: str) -> Array:
        return jax.lax.dynamic_index_in_dim(self.stacked[name], self.index, keepdims=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stacked)

    def __len__(self) -> int:
        return len(self.stacked)

    def at(self, offset: int) -> Self:
        """The view of another layer: of parameters that only some layers have."""
        moved = copy.copy(self)
        moved.index = self.index + offset
        return moved

    def of_experts(self) -> Layer:
        """The experts' parameters, as a loop may read them."""
        return self

    def entry(self, name: str, index: Int32[Array, ""]) -> Array:
        """`self[name][index]`, read from the stack without the slice of the layer."""
        whole = self.stacked[name]
        zeros = (jnp.int32(0),) * (whole.ndim - 2)
        return jax.lax.dynamic_slice(whole, (self.index, index, *zeros), (1, 1, *whole.shape[2:]))[0, 0]

    def serves(self, names: tuple[str, ...], x: Float[Array, "b t *in"]) -> bool:
        """Whether `matvec` can multiply x with these weights: a row a sequence, 16 or 8 bits, whole tiles."""
        return x.shape[1] == 1 and unsupported_reason(*self._flat(names, x)) is None

    def matvec(
        self,
        names: tuple[str, ...],
        x: Float[Array, "b 1 *in"],
        *,
        activation: Activation | None = None,
        dtype: Any = None,
    ) -> list[Float[Array, "b 1 *out"]]:
        """x times the named weights `[*in, *out]` of this layer, or their FP8 form; x is not quantized for that.

        `activation`: of two weights, that of the first product times the second. `dtype`: of the results, None for x's.
        """
        flat, weights, scales = self._flat(names, x)
        options: dict[str, Any] = {"activation": activation, "dtype": dtype}
        kernel, plain = partial(stacked_matvec, **options), partial(_products, **options)
        outs = jax.lax.platform_dependent(flat, weights, self.index, scales, cuda=kernel, default=plain)
        return self._shaped(names, outs, x)

    def _shaped(self, names: tuple[str, ...], outs: list[Array], x: Array) -> list[Array]:
        """Products of x with the free axes of their weights."""
        shapes = (
            self.stacked[f"{name}_scale"].shape[1:]
            if f"{name}_scale" in self.stacked
            else self.stacked[name].shape[x.ndim - 1 :]
            for name in names
        )
        return [out.reshape(*x.shape[:2], *shape) for out, shape in zip(outs, shapes, strict=False)]

    def _flat(self, names: tuple[str, ...], x: Array) -> tuple[Array, list[Array], list[Array]]:
        """x, weights and scales with their summed and their free axes as one each."""
        flat, weights = x.reshape(x.shape[0], -1), [self.stacked[name] for name in names]
        if f"{names[0]}_scale" not in self.stacked:
            return flat, [w.reshape(w.shape[0], flat.shape[1], -1) for w in weights], []
        scales = [self.stacked[f"{name}_scale"].reshape(weights[0].shape[0], -1) for name in names]
        return flat, [w.reshape(w.shape[0], -1, flat.shape[1]) for w in weights], scales  # the other way round


def _products(
    x: Array, weights: list[Array], layer: Array, scales: list[Array], *, activation: Activation | None, dtype: Any
) -> list[Array]:
    """`stacked_matvec` in jnp, of slices; with FP8 weights x is quantized too."""
    sliced = [jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False) for weight in weights]
    if scales:
        factors = [jax.lax.dynamic_index_in_dim(scale, layer, keepdims=False) for scale in scales]
        rows = fp8.rows_of(x)
        outs = [fp8.product(rows, weight, scale) for weight, scale in zip(sliced, factors, strict=True)]
    else:
        outs = [jnp.matmul(x, weight, preferred_element_type=dtype) for weight in sliced]
    outs = outs if activation is None else [ACTIVATIONS[activation](outs[0]) * outs[1]]
    return [out.astype(dtype or x.dtype) for out in outs]


def entry(layer: Layer, name: str, index: Int32[Array, ""]) -> Array:
    """Entry `index` of the first axis of a parameter: of one expert, say."""
    if isinstance(layer, StackedLayer):
        return layer.entry(name, index)
    return jax.lax.dynamic_index_in_dim(layer[name], index, keepdims=False)
