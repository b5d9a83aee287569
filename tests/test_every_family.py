"""What each family must have beside its row in `models.families`: one table, so that a new row cannot be half done."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_llama import random_llama
from test_gguf import FAMILIES as GGUF
from variants import VARIANTS

from minference_jax.checkpoints import names
from minference_jax.checkpoints.gguf_config import ARCHITECTURES
from minference_jax.checkpoints.presets import CONFIGS
from minference_jax.models import LlamaConfig, param_shapes
from minference_jax.models.capture import capture_qkv
from minference_jax.models.families import FAMILIES
from minference_jax.models.fp8 import CONTRACTED, quantize_params
from minference_jax.parallel.mesh import abstract_mesh
from minference_jax.parallel.specs import param_axes
from minference_jax.planning.memory import memory_need

# Of other families, the first config of each in this table: the smallest that has all of its parameters.
SMALL = {config["model_type"]: config for config in reversed(VARIANTS.values())}
NOT_IN_GGUF = {"mistral": "llama"}  # llama.cpp keeps it under another family's name


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def presets(family):
    return {name: config for name, config in CONFIGS.items() if config.model_type == family}


def test_it_is_compared_with_pytorch_and_has_a_size_that_is_known_by_name(family):
    assert family in SMALL and presets(family)
    for config in presets(family).values():
        assert LlamaConfig.from_hf(config.to_hf()) == config


def test_it_has_names_in_both_formats(family):
    config = LlamaConfig.from_hf(SMALL[family])
    for file_format in ("hf", "gguf"):
        rows = names.table(config, file_format)
        assert rows.keys() == param_shapes(config).keys()
        for path, row in rows.items():
            shape = names.Layout.of(row, config).shape
            assert (*param_shapes(config)[path][: row.axes if file_format == "hf" else 1], *shape)[
                -len(shape) :
            ] == shape
    known = NOT_IN_GGUF.get(family, family)
    assert known in (*ARCHITECTURES.values(), "olmo2") and known in GGUF


def test_memory_is_predicted_and_devices_share_the_weights(family):
    for config in presets(family).values():
        weights = 2 * sum(math.prod(shape) for shape in param_shapes(config).values())
        assert memory_need(config, tokens=4096, patterns=None).weights == weights
        heads = math.gcd(config.num_kv_heads, 8)
        mesh = abstract_mesh(f"rows={8 // heads},heads={heads}", config)
        assert memory_need(config, tokens=4096, patterns=None, mesh=mesh).weights < weights / 4
        for name, axes in param_axes(config, mesh).items():
            size = math.prod(param_shapes(config)[name])
            assert any(axes) or size < weights / 2000 or config.vocab_size % 8, name


def test_its_projections_can_be_in_fp8(family):
    config = LlamaConfig.from_hf(SMALL[family])
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in param_shapes(config).items()}
    quantized = jax.eval_shape(quantize_params, shapes)
    matrices = {
        name
        for name, shape in param_shapes(config).items()
        if name.startswith(("layers.w", "layers.expert", "layers.shared"))
    }
    matrices -= {"layers.wide_q_norm", "layers.wide_k_norm"}
    assert {f"{name}_scale" for name in matrices} == quantized.keys() - shapes.keys()
    assert {name.removeprefix("layers.") for name in matrices} <= CONTRACTED.keys()


def test_a_search_can_read_its_layers(family):
    """What a search measures: queries and keys of each layer, whose attention is the model's own."""
    model = random_llama(LlamaConfig.from_hf(SMALL[family]))
    tokens = jnp.asarray(np.arange(40)[None] % model.config.vocab_size, jnp.int32)
    layers = list(capture_qkv(model, tokens))
    assert len(layers) == model.config.num_layers
    for q, k, v in layers:
        assert q.shape == (1, 40, model.config.num_heads, model.config.head_dim)
        assert k.shape == v.shape == (1, 40, model.config.num_kv_heads, model.config.head_dim)
        assert bool(jnp.all(jnp.isfinite(q)) and jnp.all(jnp.isfinite(k)))
