"""One launch of a kernel with entries of every kind, for compute-sanitizer (see test_sanitizer.py)."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from plans import random_plan

from pallas_kernels import sparse_attention

if __name__ == "__main__":
    plan = random_plan(np.random.default_rng(1), 1, 2, 300, 300, columns=90, bands=4, blocks=2)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 300, n, 128), jnp.bfloat16) for key, n in zip(keys, (2, 1, 1), strict=True))
    attend = jax.jit(lambda q, k, v, plan: sparse_attention(q, k, v, plan, implementation=sys.argv[1], return_lse=True))
    out, lse = attend(q, k, v, plan)
    assert bool(jnp.isfinite(out).all() and jnp.isfinite(lse).all())
    print("ran to its end")
