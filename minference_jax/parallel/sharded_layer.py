"""A layer of which each device holds a slice, for decoding: it multiplies with its slice, and devices sum or join.

Tensor parallelism: projections into heads and into the MLP's width give each device its own outputs; those back into
the residual stream sum what each device has of them. Every device reads its own slice of the weights and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from minference_jax.models.layers import project
from minference_jax.models.stacked import Layer, StackedLayer
from minference_jax.parallel.mesh import ROWS
from pallas_kernels.rows.quantize import Activation

INTO_HEADS, OUT_OF_HEADS = ("wq", "wk", "wv"), ("wo",)
OUT_OF_MLP = (("w_down",), ("shared_down",))


LARGE = 1 << 20
"""Bytes of a slice that is worth a copy of its own. Smaller ones are gathered by XLA, many at once."""

Cut = tuple[tuple[str, ...], ...]
"""For each axis of an array the mesh axes over which it is cut."""


def gather(x: Array, axes: Cut) -> Array:
    """All of an array of which each device has a slice."""
    for axis, names in enumerate(axes):
        x = jax.lax.all_gather(x, names, axis=axis, tiled=True) if names else x
    return x


def gather_for_prefill(x: Array, axes: Cut) -> Array:
    """`gather`; a large array as an exchange of equal parts, which the program copies from memory to memory.

    A gathering kernel of NCCL takes multiprocessors from what is computed beside it.
    """
    if x.nbytes < LARGE:
        return gather(x, axes)
    for axis, names in enumerate(axes):
        if names:
            parts = jnp.broadcast_to(x, (jax.lax.axis_size(names), *x.shape))
            parts = jax.lax.all_to_all(parts, names, split_axis=0, concat_axis=0, tiled=True)
            x = jnp.moveaxis(parts, 0, axis).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return x


class GatheredLayer(StackedLayer):
    """One layer of stacked slices, each parameter gathered when it is asked for; what lies with the heads stays cut."""

    def __init__(self, stacked: Layer, index: Int32[Array, ""], axes: Mapping[str, tuple[tuple[str, ...], ...]]):
        super().__init__(stacked, index)
        self.axes = axes

    def __getitem__(self, name: str) -> Array:
        value = super().__getitem__(name)
        return value if name == "sinks" else gather_for_prefill(value, self.axes[f"layers.{name}"][1:])

    def of_experts(self) -> Layer:
        """Gathered before the loop: each device's is as long as its rows make it, and devices gather together."""
        experts = ("expert_", "b_expert_", "router", "b_router", "choice_bias", "shared_")
        return {name: self[name] for name in self.stacked if name.startswith(experts)}

    def serves(self, names: tuple[str, ...], x: Float[Array, "b t *in"]) -> bool:
        return False


class ShardedLayer(StackedLayer):
    """One layer of stacked slices; `axes` as `specs.param_axes` has them.

    Experts are gathered: a token's few experts would be on few devices.
    """

    def __init__(self, stacked: Layer, index: Int32[Array, ""], axes: Mapping[str, tuple[tuple[str, ...], ...]]):
        super().__init__(stacked, index)
        self.axes = axes

    def entry(self, name: str, index: Int32[Array, ""]) -> Array:
        return gather(super().entry(name, index), self.axes[f"layers.{name}"][2:])

    def serves(self, names: tuple[str, ...], x: Float[Array, "b t *in"]) -> bool:
        return True

    def matvec(
        self,
        names: tuple[str, ...],
        x: Float[Array, "b 1 *in"],
        *,
        activation: Activation | None = None,
        dtype: Any = None,
    ) -> list[Float[Array, "b 1 *out"]]:
        cut = tuple(name for axis in self.axes[f"layers.{names[0]}"] for name in axis)
        if names == OUT_OF_HEADS and ROWS in cut:  # x has whole heads, the weights a part of each
            size = self.stacked["wo"].shape[-2 if "wo_scale" not in self.stacked else -1]
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(ROWS) * size, size, axis=-1)
        own, summed = StackedLayer(self.stacked, self.index), names in (OUT_OF_HEADS, *OUT_OF_MLP) and cut
        outs = project(own, names, x, activation=activation, dtype=jnp.float32 if summed else dtype)
        if summed:
            return [jax.lax.psum(out, cut).astype(dtype or x.dtype) for out in outs]
        if names == INTO_HEADS and ROWS in cut:
            return [jax.lax.all_gather(out, ROWS, axis=-1, tiled=True) for out in outs]
        return outs
