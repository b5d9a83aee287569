"""`python -m minference_jax` is the console script, for a checkout that is not installed."""

import sys

from minference_jax.cli import main

sys.exit(main())
