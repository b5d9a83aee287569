"""Runs models on 4 and 8 virtual devices and on one; prints the largest difference of each case. A child process."""

import os
import sys

os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import numpy as np

from minference_jax.models.config import LlamaConfig
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama
from minference_jax.parallel import make_mesh
from minference_jax.patterns import AShape, Dense, HeadPatterns, SharedDensity

FAMILIES = (SharedDensity(0.4), AShape(64, 128), Dense())
SHARED = HeadPatterns((tuple(FAMILIES[head % 3] for head in range(8)), (Dense(),) * 8))
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 555))
LENGTHS = np.array([300, 555])


def largest(one, many) -> float:
    """The largest difference of two trees of arrays."""
    assert jax.tree.structure(one) == jax.tree.structure(many)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    return max(float(np.max(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)))) for a, b in pairs)


def model(kv_heads, patterns=None):
    config = LlamaConfig(96, 64, 128, num_layers=2, num_heads=8, num_kv_heads=kv_heads, head_dim=16)
    return Llama.random(config, jax.random.key(0), patterns=patterns)


def prefill(one, **mesh):
    """Of both models: what prefill returns, and what a decoding step does then."""
    models = (one, one.on(make_mesh(**mesh)))
    info = one.patterns is not None
    found = [m.prefill(TOKENS, LENGTHS, m.init_cache(2, 640), return_info=info) for m in models]
    exact = largest(*found)
    after = [m.decode(np.argmax(f[0], -1), f[1]) for m, f in zip(models, found, strict=True)]
    return exact, largest(*after)


def generation(one, **mesh):
    """Tokens and caches of a prompt in parts."""
    models = (one, one.on(make_mesh(**mesh)))
    found = [generate(m, TOKENS, LENGTHS, max_new_tokens=16, prefill_chunk=384, eos_token_ids=()) for m in models]
    return largest(*(f.tokens for f in found)), largest(*(f.cache for f in found))


CASES = {
    "one head a device": lambda: prefill(model(8), heads=8),
    "rows and heads, patterns": lambda: prefill(model(2, SHARED), rows=2, heads=2),
    "rows alone": lambda: prefill(model(1), rows=4, heads=1),
    "rows and heads in parts": lambda: generation(model(2), rows=4, heads=2),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        exact, close = CASES[name]()
        print(f"{name}: {exact} {close}", flush=True)
