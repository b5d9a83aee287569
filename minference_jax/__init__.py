"""MInference 1.0 for JAX: dynamic sparse attention for the prefill of long prompts.

Names are loaded when first used, so that `import minference_jax` stays fast and needs no GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Dense": "patterns",
    "AShape": "patterns",
    "VerticalSlash": "patterns",
    "BlockSparse": "patterns",
    "HeadPatterns": "patterns",
    "PerTile": "patterns",
    "SharedDensity": "patterns",
    "PlanBuilder": "patterns",
    "LayerPatterns": "patterns",
    "make_plan": "attention",
    "sparse_attention": "attention",
    "AttentionInfo": "attention",
    "recall": "index.recall",
    "tile_budget": "index",
    "load_patterns": "patterns.files",
    "save_patterns": "patterns.files",
    "preset": "patterns.files",
    "parse_pattern": "patterns.text",
    "Llama": "models.llama",
    "LlamaConfig": "models.config",
    "generate": "models.generate",
    "capture_qkv": "models.capture",
    "load_checkpoint": "checkpoints.convert",
    "save_checkpoint": "checkpoints.save",
    "load_tokenizer": "text.tokenizer",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from minference_jax.attention import AttentionInfo as AttentionInfo
    from minference_jax.attention import make_plan as make_plan
    from minference_jax.attention import sparse_attention as sparse_attention
    from minference_jax.checkpoints.convert import load_checkpoint as load_checkpoint
    from minference_jax.checkpoints.save import save_checkpoint as save_checkpoint
    from minference_jax.index import tile_budget as tile_budget
    from minference_jax.index.recall import recall as recall
    from minference_jax.models.capture import capture_qkv as capture_qkv
    from minference_jax.models.config import LlamaConfig as LlamaConfig
    from minference_jax.models.generate import generate as generate
    from minference_jax.models.llama import Llama as Llama
    from minference_jax.patterns import AShape as AShape
    from minference_jax.patterns import BlockSparse as BlockSparse
    from minference_jax.patterns import Dense as Dense
    from minference_jax.patterns import HeadPatterns as HeadPatterns
    from minference_jax.patterns import LayerPatterns as LayerPatterns
    from minference_jax.patterns import PerTile as PerTile
    from minference_jax.patterns import PlanBuilder as PlanBuilder
    from minference_jax.patterns import SharedDensity as SharedDensity
    from minference_jax.patterns import VerticalSlash as VerticalSlash
    from minference_jax.patterns.files import load_patterns as load_patterns
    from minference_jax.patterns.files import preset as preset
    from minference_jax.patterns.files import save_patterns as save_patterns
    from minference_jax.patterns.text import parse_pattern as parse_pattern
    from minference_jax.text.tokenizer import load_tokenizer as load_tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
