"""Random weights of a config's shapes, made on the device."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from minference_jax.models.config import LlamaConfig
from minference_jax.models.params import BIASES, IN_FLOAT32, layer_shapes, layers_with, param_shapes


@partial(jax.jit, static_argnums=(0, 2))
def random_params(config: LlamaConfig, key: Array, dtype: str) -> dict[str, Array]:
    """Norms of one, biases and sinks of zero, matrices of standard deviation 1/√(inputs), as `param_shapes` names them.

    Drawn layer by layer, so float32 numbers exist for one layer only. `config`, `dtype`: static.
    """
    # Hardware-style random bits: the default generator takes seconds to compile for so many shapes.
    key = jax.random.wrap_key_data(jax.random.bits(key, (4,), jnp.uint32), impl="rbg")

    def draw(key: Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
        params = {}
        for index, (name, shape) in enumerate(shapes.items()):
            if name.endswith("norm"):
                params[name] = jnp.full(shape, 1 - (config.traits.norm_offset or 0), dtype)
            elif name in BIASES:
                params[name] = jnp.zeros(shape, jnp.float32 if name in IN_FLOAT32 else dtype)
            else:
                inputs = {"embed": shape[-1], "wo": config.num_heads * config.head_dim}.get(name, shape[0])
                inputs = shape[1] if name.startswith("expert_") else inputs
                noise = jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)
                params[name] = (noise * inputs**-0.5).astype(dtype)
        return params

    outer, inner = jax.random.split(key)
    params = draw(
        outer, {name: shape for name, shape in param_shapes(config).items() if not name.startswith("layers.")}
    )
    layers = jax.lax.map(lambda key: draw(key, layer_shapes(config)), jax.random.split(inner, config.num_layers))
    return params | {f"layers.{name}": value[: len(layers_with(config, name))] for name, value in layers.items()}
