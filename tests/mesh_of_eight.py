"""Models on meshes of 4 and 8 virtual devices beside the same on one; prints differences. A child process.

One model on one device serves several meshes, since compiling takes nearly all of the time.
"""

import os

os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import numpy as np

from minference_jax.models.config import LlamaConfig
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama
from minference_jax.parallel import make_mesh, stream
from minference_jax.patterns import AShape, Dense, HeadPatterns

# Of a head's slice of less than 32 columns some CPUs round a product otherwise than of the whole.
CONFIG = LlamaConfig(256, 64, 128, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=16)
# Dear heads come first, so that KV groups are dealt in another order; the second layer is dense on all devices.
UNEVEN = HeadPatterns(((*(Dense(),) * 3, *(AShape(64, 64),) * 5), (Dense(),) * 8))
# Odd lengths, which no mesh divides; the first is shorter by more than a query tile.
TOKENS, LENGTHS = np.random.default_rng(0).integers(0, 96, (2, 555)), np.array([300, 555])


def largest(one, many) -> float:
    """The largest difference of two trees of arrays."""
    assert jax.tree.structure(one) == jax.tree.structure(many)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    return max(float(np.max(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)))) for a, b in pairs)


def prefill(model):
    return model.prefill(TOKENS, LENGTHS, model.init_cache(2, 640), return_info=True)


def turns(model):
    """Two turns, the prompts in parts: tokens of both, and the cache."""
    first = generate(model, TOKENS, LENGTHS, max_new_tokens=64, prefill_chunk=384, eos_token_ids=())
    whole = [[*TOKENS[i][: LENGTHS[i]], *first.sequences()[i], 7] for i in range(2)]
    second = generate(model, whole, max_new_tokens=8, prefill_chunk=384, cache=first.cache)
    assert second.stats.cached_tokens >= 2 * 256
    return (first.tokens, second.tokens), second.cache


if __name__ == "__main__":
    sparse = Llama.random(CONFIG, jax.random.key(0), patterns=UNEVEN)
    reference, least = prefill(sparse), stream.LEAST
    for sizes in ({"heads": 4}, {"rows": 4, "heads": 2}):
        many = sparse.on(make_mesh(**sizes))
        assert (many.order(555) is None) == (sizes["heads"] == 4)  # each device has one group anyway
        found = prefill(many)
        shard = found[1].k.addressable_shards[0].data.shape
        assert shard == (2, 2, 640, 4 // sizes["heads"], 16), shard
        print("prefill", largest(reference, found), flush=True)
    # Pieces of a few rows, which CPUs sum otherwise than all at once.
    stream.LEAST = 8
    for sizes in ({"heads": 4}, {"rows": 2, "heads": 2}):
        many = sparse.on(make_mesh(**sizes))
        print("pieces", largest(reference[:2], prefill(many)[:2]), flush=True)
    stream.LEAST = least
    dense = sparse.with_patterns(None)
    (tokens, cache), (same, other) = turns(dense), turns(dense.on(make_mesh(rows=2, heads=2)))
    print("tokens", largest(tokens, same))
    print("cache", largest(cache, other))
