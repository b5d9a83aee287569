"""What the devices of a mesh send each other in one forward pass. On one device each of these does nothing.

Outside attention a device holds a slice of the rows; inside it some heads and all rows of them:

    x [b, t/N, d] → q, k, v [b, t/N, heads, h] → exchange → [b, t, heads/N, h] → attention → exchange → x

so that attention is that of one device, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from minference_jax.models.config import LlamaConfig
from minference_jax.models.stacked import Layer, StackedLayer
from minference_jax.parallel.mesh import HEADS, ROWS
from minference_jax.parallel.sharded_layer import GatheredLayer, ShardedLayer, gather, gather_for_prefill
from minference_jax.parallel.specs import ALL, is_fp8, param_axes, place, specs_of
from minference_jax.zigzag import Zigzag
from pallas_kernels.device import on_target
from pallas_kernels.sizes import QUERY_TILE

OF_HEADS = PartitionSpec(None, None, HEADS)
"""Arrays [layers, b, n]."""


@dataclass(frozen=True)
class Exchange:
    """The devices that share a forward pass: those of `mesh`, or one. Hashable, a static argument of programs.

    `run` is called outside `jax.shard_map`, all else inside it.
    """

    mesh: Mesh | None = None

    @property
    def size(self) -> int:
        """Devices."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def in_one_process(self) -> bool:
        """Whether one process has all devices, of which there are several."""
        return self.mesh is not None and self.size > 1 and not self.mesh.is_multi_process

    @property
    def rows(self) -> int:
        """Devices that share the query tiles of a head."""
        return 1 if self.mesh is None else self.mesh.shape[ROWS]

    @property
    def heads(self) -> int:
        """Groups of devices that have different heads."""
        return 1 if self.mesh is None else self.mesh.shape[HEADS]

    @property
    def axis_name(self) -> str | None:
        """The mesh axis over which the heads of a layer are divided, if they are."""
        return None if self.heads == 1 else HEADS

    def place(self, config: LlamaConfig, tree: Any) -> Any:
        """Parameters, patterns, a cache or inputs where the devices want them."""
        return tree if self.mesh is None else place(config, self.mesh, tree)

    def run(self, config: LlamaConfig, function: Callable[..., Any], *args: Any, out: Any = None) -> Any:
        """`function(*args)` on every device, with its slices of parameters, patterns and cache.

        `out`: the `PartitionSpec`s of the results, by default that each device has all of them.
        """
        if self.mesh is None or self.size == 1:
            return function(*args)
        specs = tuple(specs_of(config, self.mesh, arg) for arg in args)
        out = PartitionSpec() if out is None else out
        mesh = on_target(self.mesh)
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*args)

    everywhere = PartitionSpec()
    """Of a result that every device has."""

    def rows_on(self, axis: int) -> PartitionSpec:
        """Of a result of which every device has its own rows, on this axis."""
        return PartitionSpec(*(None,) * axis, (ROWS, HEADS))

    def in_order(self, x: Array, axis: int, t: int) -> Array:
        """All rows, in the order of devices, as the t rows of the prompt."""
        return jax.lax.slice_in_dim(x, 0, t, axis=axis) if self.zigzag is None else self.zigzag.back(x, axis, t)

    def make(self, config: LlamaConfig, create: Callable[[], Any]) -> Any:
        """`create()` made on the devices, each making the slice that it holds."""
        assert self.mesh is not None
        specs = specs_of(config, self.mesh, jax.eval_shape(create))
        shardings = jax.tree.map(partial(NamedSharding, self.mesh), specs)
        return jax.jit(create, out_shardings=shardings)()

    def specs(self, config: LlamaConfig, tree: Any) -> Any:
        """The `PartitionSpec`s of a cache, for `run`'s `out`."""
        return PartitionSpec() if self.mesh is None or tree is None else specs_of(config, self.mesh, tree)

    @property
    def zigzag(self) -> Zigzag | None:
        """How the devices along `rows` share the query tiles of their heads; None where each has its own heads."""
        if self.mesh is None or self.rows == 1:
            return None
        return Zigzag(ROWS, self.rows, math.lcm(QUERY_TILE, self.heads))

    def _slice(self, t: int) -> int:
        """Rows of a device, of t."""
        return -(-t // self.size) if self.zigzag is None else self.zigzag.padded(t) // self.size

    def own_rows(self, x: Array) -> Array:
        """This device's rows of an array `[b, t, …]` that every device has, padded with zeros to a slice."""
        if self.size == 1:
            return x
        size = self._slice(x.shape[1])
        x = jnp.pad(x, [(0, 0), (0, size * self.size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
        x = x if self.zigzag is None else self.zigzag.dealt(x, 1)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index((ROWS, HEADS)) * size, size, axis=1)

    def positions(self, t: int) -> Int32[Array, " t"]:
        """The places of this device's rows among t."""
        return self.own_rows(jnp.arange(self._slice(t) * self.size, dtype=jnp.int32)[None])[0]

    def all_rows(self, x: Array, t: int) -> Array:
        """All t rows of an array `[b, rows, …]` of which each device has its own, on every device."""
        if self.size == 1:
            return x
        return self.in_order(jax.lax.all_gather(x, (ROWS, HEADS), axis=1, tiled=True), 1, t)

    def row(self, x: Float[Array, "b t d"], at: Int32[Array, " b"], t: int) -> Float[Array, "b 1 d"]:
        """Row `at` (clipped to the t there are) of each sequence, on every device."""
        at = jnp.clip(at, 0, t - 1)
        if self.size == 1:
            return jnp.take_along_axis(x, at[:, None, None], axis=1)
        own = self.positions(t)[None] == at[:, None]
        found = jnp.take_along_axis(x, jnp.argmax(own, axis=1)[:, None, None], axis=1)
        return jax.lax.psum(jnp.where(own.any(axis=1)[:, None, None], found, 0), (ROWS, HEADS))

    def groups(self) -> list[Int32[Array, ""]]:
        """The groups of heads of the devices from this one on, along `heads`."""
        found = (jax.lax.axis_index(HEADS) + jnp.arange(self.heads, dtype=jnp.int32)) % self.heads
        # There before they are used: a kernel that computes them beside its addresses reads and writes 2 bytes at once.
        return list(jax.lax.optimization_barrier(found))

    @property
    def parts(self) -> int:
        """Parts of what `swap` is given: one for each group of heads; where there are two, the other's alone."""
        return 1 if self.heads == 2 else self.heads

    def part(self, group: Int32[Array, ""]) -> Int32[Array, ""]:
        """Which part is that of another group."""
        return group if self.heads > 2 else jnp.zeros_like(group)

    def swap(self, x: Float[Array, "parts ..."]) -> Float[Array, "parts ..."]:
        """What each device has for others becomes what it has from them, with equal parts for each on axis 0; a part
        that a device has for itself need not be set.

        Of two each sends the other what it has: in an all-to-all it would copy as much for itself, beside which nothing
        else is computed (3.2 of 298 ms of a layer at 1M tokens on two H200s, traced at commit 65b749f).
        """
        if self.heads == 2:
            return jax.lax.ppermute(x, HEADS, [(0, 1), (1, 0)])
        return jax.lax.all_to_all(x, HEADS, split_axis=0, concat_axis=0, tiled=True)

    def all_rows_of_heads(self, x: Float[Array, "b rows heads h"], t: int) -> Float[Array, "b t heads h"]:
        """All t rows of this device's heads, from those of all devices along `heads`."""
        return self.in_order(x if self.rows == 1 else jax.lax.all_gather(x, ROWS, axis=1, tiled=True), 1, t)

    def own_queries(self, x: Float[Array, "b t heads h"]) -> Float[Array, "b own heads h"]:
        """Of all rows of some heads, those that this device attends for."""
        return x if self.zigzag is None else self.zigzag.own(x)

    def whole_layer(self, config: LlamaConfig, layer: Layer) -> Layer:
        """A layer's parameters, gathered; what belongs to heads inside attention stays a slice."""
        if self.mesh is None or self.size == 1:
            return layer
        axes = param_axes(config, self.mesh, "wq_scale" in layer)
        if isinstance(layer, StackedLayer):
            return GatheredLayer(layer.stacked, layer.index, axes)
        return {
            name: value if name == "sinks" else gather_for_prefill(value, axes[f"layers.{name}"][1:])
            for name, value in layer.items()
        }

    def together(self, x: Array, layer: Layer) -> tuple[Array, Layer]:
        """Both, when both are there: the parameters are then on their way while x is computed, and not after it."""
        if self.size == 1 or isinstance(layer, StackedLayer):
            return x, layer
        return jax.lax.optimization_barrier((x, layer))

    def whole(self, config: LlamaConfig, params: Mapping[str, Array], *names: str) -> dict[str, Array]:
        """The parameters with those of `names` gathered."""
        if self.mesh is None or self.size == 1:
            return dict(params)
        axes = param_axes(config, self.mesh, is_fp8(params))
        return {**params, **{name: gather(params[name], axes[name]) for name in names if name in params}}

    def layer(self, config: LlamaConfig, stacked: Layer, index: Int32[Array, ""]) -> StackedLayer:
        """One layer as decoding takes it: each device multiplies with its slices."""
        if self.mesh is None or self.size == 1:
            return StackedLayer(stacked, index)
        return ShardedLayer(stacked, index, param_axes(config, self.mesh, "wq_scale" in stacked))

    def take(self, config: LlamaConfig, table: Array, tokens: Int32[Array, "b t"]) -> Float[Array, "b t d"]:
        """Rows of the embeddings, or of this device's slice of them; ids outside the vocabulary are clipped into it."""
        if table.shape[0] == config.vocab_size:
            return jnp.take(table, tokens, axis=0, mode="clip")
        place = jnp.clip(tokens, 0, config.vocab_size - 1) - jax.lax.axis_index(ALL) * table.shape[0]
        own = (place >= 0) & (place < table.shape[0])
        found = jnp.where(own[..., None], jnp.take(table, place, axis=0, mode="clip"), 0)
        return jax.lax.psum(found, ALL)

    def join(self, config: LlamaConfig, y: Float[Array, "b t v"]) -> Float[Array, "b t vocab"]:
        """Logits of the whole vocabulary from those of a device's slice of it."""
        return y if y.shape[-1] == config.vocab_size else jax.lax.all_gather(y, ALL, axis=-1, tiled=True)


ONE = Exchange()
"""One device."""
