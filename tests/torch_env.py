"""Where the tests find PyTorch: in an interpreter of its own, which `make test` builds as .venv-torch."""

import functools

import pytest

from minference_jax.compare import TorchNotFoundError, find_torch_python


@functools.cache
def _torch_python() -> tuple[str, str]:
    try:
        return str(find_torch_python()), ""
    except TorchNotFoundError as error:
        return "", str(error)


def torch_python() -> str:
    """The interpreter with PyTorch; skips the test, saying what is missing, when there is none."""
    python, reason = _torch_python()
    if not python:
        pytest.skip(reason)
    return python
