"""Llama-family models in Flax NNX: configuration, weights, prefill, decoding."""

from minference_jax.models.config import LlamaConfig as LlamaConfig
from minference_jax.models.config import RopeConfig as RopeConfig
from minference_jax.models.params import param_shapes as param_shapes
