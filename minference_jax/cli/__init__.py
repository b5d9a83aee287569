"""The command line: one command a file. `main` is the console script `minference-jax`."""

from minference_jax.cli.app import main as main
