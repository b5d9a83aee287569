"""Which slice of each array a device of a mesh holds: a table of parameters, and the cache and patterns.

Weights lie over all devices, so that one device holds 1 / N of them, cut as tensor parallelism wants them: decoding
multiplies with the slices as they are. Projections into heads are cut by heads, and each head by `rows`; those of the
MLP by its width; embeddings and head by the vocabulary. An axis that the mesh does not divide is not cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from minference_jax.models.cache import KVCache
from minference_jax.models.config import LlamaConfig
from minference_jax.models.fp8 import CONTRACTED, fp8_shapes
from minference_jax.models.params import param_shapes
from minference_jax.parallel.mesh import HEADS, ROWS
from minference_jax.patterns.heads import LayerPatterns

Axes = tuple[str, ...]
ALL: Axes = (HEADS, ROWS)
_H, _R = (HEADS,), (ROWS,)

# Mesh axes of each axis of a parameter, of a layer without the layer axis. What is not here is on every device.
_TABLE: dict[str, tuple[Axes, ...]] = {
    "embed": (ALL, ()),
    "lm_head": ((), ALL),
    "wq": ((), _H, _R),
    "wk": ((), _H, _R),
    "wv": ((), _H, _R),
    "wo": (_H, _R, ()),
    "bq": (_H, ()),
    "bk": (_H, ()),
    "bv": (_H, ()),
    "wide_q_norm": (_H, ()),
    "wide_k_norm": (_H, ()),
    "sinks": (_H,),
    "w_gate": ((), ALL),
    "w_up": ((), ALL),
    "w_down": (ALL, ()),
    "b_gate": (ALL,),
    "b_up": (ALL,),
    "shared_gate": ((), ALL),
    "shared_up": ((), ALL),
    "shared_down": (ALL, ()),
    "expert_gate": ((), (), ALL),
    "expert_up": ((), (), ALL),
    "expert_down": ((), ALL, ()),
}


@lru_cache(maxsize=64)
def param_axes(config: LlamaConfig, mesh: Mesh | AbstractMesh, fp8: bool = False) -> Mapping[str, tuple[Axes, ...]]:
    """Name → for each axis of a parameter the mesh axes over which it is cut; with `fp8` of FP8 projections."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, shape in param_shapes(config).items():
        leaf = name.removeprefix("layers.")
        lead = ((),) if leaf != name else ()
        axes = (*lead, *_TABLE.get(leaf, ()))
        axes = (*axes, *((),) * (len(shape) - len(axes)))
        axes = (tuple(name for name in a if mesh.shape[name] > 1) for a in axes)
        found[name] = tuple(a if size % _devices(mesh, a) == 0 else () for a, size in zip(axes, shape, strict=True))
    # FP8 weights and their scales have the same axes, in another order.
    return cast(Any, fp8_shapes(found)) if fp8 else found


def _devices(mesh: Mesh | AbstractMesh, axes: Axes) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def param_specs(config: LlamaConfig, mesh: Mesh, fp8: bool = False) -> dict[str, PartitionSpec]:
    """Name → `PartitionSpec` of every parameter; with `fp8` of a model with FP8 projections."""
    return {
        name: PartitionSpec(*(axis or None for axis in axes)) for name, axes in param_axes(config, mesh, fp8).items()
    }


def is_fp8(names: Mapping[str, Any]) -> bool:
    """Whether these parameters have FP8 projections."""
    return any(f"layers.{name}_scale" in names for name in CONTRACTED)


def specs_of(config: LlamaConfig, mesh: Mesh, tree: Any) -> Any:
    """The `PartitionSpec`s of a model's parameters, head patterns or cache; anything else is on every device."""
    if isinstance(tree, LayerPatterns):
        return jax.tree.map(lambda _: PartitionSpec(None, HEADS), tree)
    if isinstance(tree, KVCache):
        scale = None if tree.k_scale is None else PartitionSpec(None, None, None, HEADS)
        rows = PartitionSpec(None, None, None, HEADS, None)
        whole = PartitionSpec()
        return dataclasses.replace(tree, k=rows, v=rows, k_scale=scale, v_scale=scale, tokens=whole, lengths=whole)
    if isinstance(tree, Mapping):
        specs = param_specs(config, mesh, is_fp8(tree))
        return {name: specs[name] for name in tree}
    return PartitionSpec()


def place(config: LlamaConfig, mesh: Mesh, tree: Any) -> Any:
    """Parameters, patterns, a cache or other arrays as every device holds them; tracers stay as they are."""
    specs = specs_of(config, mesh, tree)
    if isinstance(specs, PartitionSpec):
        return jax.tree.map(lambda x: put(x, NamedSharding(mesh, specs)), tree)
    return jax.tree.map(lambda x, spec: put(x, NamedSharding(mesh, spec)), tree, specs)


def put(x: Any, sharding: NamedSharding) -> Array:
    """An array that every process has, on the devices of a mesh: each process places what its own devices hold."""
    if isinstance(x, Tracer) or (isinstance(x, jax.Array) and x.sharding == sharding):
        return x
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(x)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
