"""What is installed with what: the core serves the operator, and each extra brings the packages of its features.

`pip install minference-jax` is the core (JAX, NumPy, jaxtyping). All else is imported where it is used, and says which
extra brings it where it is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

EXTRA_OF = {
    "flax": "models",
    "huggingface_hub": "models",
    "safetensors": "models",
    "tokenizers": "models",
    "transformers": "models",
    "gguf": "gguf",
    "rich": "cli",
    "typer": "cli",
    "matplotlib": "plots",
    "rapidfuzz": "eval",
    "llguidance": "schema",
    "lm_eval": "harness",
    "torch": "torch",
}
"""Packages that are not in the core, and the extra that brings each."""


@contextlib.contextmanager
def naming_extra(purpose: str = "this") -> Iterator[None]:
    """An import within the block that fails says what needs the package, and how to install it.

    **Raises:** ModuleNotFoundError, as the import does, with a text of its own for the packages of `EXTRA_OF`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = EXTRA_OF.get(package)
        if extra is None:
            raise
        text = f"{purpose} needs {package}: pip install 'minference-jax[{extra}]'"
        raise ModuleNotFoundError(text, name=error.name) from error
