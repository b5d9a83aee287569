"""The command line: one command a file. `main` is the console script `minference-jax`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from minference_jax.extras import naming_extra


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status; `arguments` defaults to those of the process.

    Where the packages of the command line are not installed, it says so and returns 1.
    """
    try:
        with naming_extra("the command line"):
            from minference_jax.cli import app
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return app.main(arguments)
