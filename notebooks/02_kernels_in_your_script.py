# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · Three kernels in your own script
#
# You need no model to use the kernels: they are functions of arrays, with the layout of `jax.nn.dot_product_attention`,
# `[batch, tokens, heads, head_dim]`. They work inside `jax.jit`, on padded batches, with grouped KV heads. On a Hopper
# GPU a Pallas kernel serves them, elsewhere blockwise XLA code that visits the same keys.

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from pallas_kernels import (
    a_shape_attention,
    block_sparse_attention,
    choose_implementation,
    dense_attention,
    vertical_slash_attention,
)
from pallas_kernels.plan_builders import a_shape_plan, block_sparse_plan, vertical_slash_plan

T = int(os.environ.get("NOTEBOOK_TOKENS", "512"))
BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 64
on_gpu = jax.default_backend() == "gpu"
dtype = jnp.bfloat16 if on_gpu else jnp.float32
keys = jax.random.split(jax.random.key(0), 3)
q = jax.random.normal(keys[0], (BATCH, T, HEADS, DIM), dtype)
k, v = (jax.random.normal(key, (BATCH, T, KV_HEADS, DIM), dtype) for key in keys[1:])
lengths = jnp.asarray([T, T - 77], jnp.int32)  # the second sequence is padded
print("device:", jax.devices()[0])

# %% [markdown]
# ## One call each
#
# The index is yours: key positions, distances, or key tiles, as int32 arrays per batch and head. Here some simple ones.

# %%
columns = jnp.broadcast_to(jnp.arange(0, T, 97, dtype=jnp.int32), (BATCH, HEADS, len(range(0, T, 97))))
slashes = jnp.broadcast_to(jnp.asarray([*range(64), 300, 301, 302], jnp.int32), (BATCH, HEADS, 67))
tiles = jnp.arange(T // 128, dtype=jnp.int32)  # of 128 queries
blocks = jnp.broadcast_to(jnp.stack([tiles, jnp.zeros_like(tiles)], -1), (BATCH, HEADS, T // 128, 2))  # of 64 keys

CALLS = {
    "A-shape": jax.jit(lambda q, k, v, n: a_shape_attention(q, k, v, sink=64, window=256, lengths=n)),
    "vertical-slash": jax.jit(lambda q, k, v, n: vertical_slash_attention(q, k, v, columns, slashes, lengths=n)),
    "block-sparse": jax.jit(lambda q, k, v, n: block_sparse_attention(q, k, v, blocks, lengths=n)),
    "dense": jax.jit(lambda q, k, v, n: dense_attention(q, k, v, lengths=n)),
}
outputs = {name: call(q, k, v, lengths) for name, call in CALLS.items()}
for name, out in outputs.items():
    print(f"{name:15s} {out.shape} {out.dtype}, padded rows are zero: {bool(jnp.all(out[1, T - 77 :] == 0))}")

# %% [markdown]
# ## The result is exactly what the mask says
#
# Every plan can be spelled out as a dense mask. Plain softmax attention under that mask, in float32, is the reference.

# %%
PLANS = {
    "A-shape": a_shape_plan(BATCH, HEADS, sink=64, window=256),
    "vertical-slash": vertical_slash_plan(columns, slashes, kv_len=T),
    "block-sparse": block_sparse_plan(blocks),
}


@jax.jit
def masked(plan, q, k, v):
    """Attention of the first head, under the plan's mask."""
    mask = plan.to_mask(T, T, lengths=lengths)[:, 0]
    precision = jax.lax.Precision.HIGHEST
    floats = [x[:, :, 0].astype(jnp.float32) for x in (q, k, v)]
    scores = jnp.einsum("bth,bsh->bts", *floats[:2], precision=precision) * DIM**-0.5
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1), 0)
    return mask, jnp.einsum("bts,bsh->bth", weights, floats[2], precision=precision)


figure, axes = plt.subplots(1, 3, figsize=(8, 3), layout="constrained")
for axis, (name, plan) in zip(axes, PLANS.items(), strict=True):
    mask, expected = masked(plan, q, k, v)
    difference = float(jnp.max(jnp.abs(outputs[name][:, :, 0].astype(jnp.float32) - expected)))
    axis.imshow(mask[0], cmap="Blues", aspect="auto")
    axis.set(title=f"{name}\nlargest difference {difference:.1e}", xlabel="key", ylabel="query")
    assert difference < (3e-2 if on_gpu else 2e-5), (name, difference)
plt.show()

# %% [markdown]
# ## Which implementation ran?

# %%
for name, plan in PLANS.items():
    print(f"{name:15s}", choose_implementation(q, k, v, plan))

# %% [markdown]
# ## Time against length
#
# A plan of fixed width visits a number of keys that grows with the length, not with its square: the longer the prompt,
# the more it wins. Short prompts gain nothing.


# %%
def milliseconds(call, *arguments) -> float:
    """The best of three runs, after one that compiles."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(1e3 * (time.perf_counter() - started))
    return min(times)


LENGTHS = [n for n in (512, 1024, 2048, 4096, 8192) if n <= 2 * T]
timed = {name: [] for name in ("dense", "A-shape")}
for n in LENGTHS:
    rows = [jnp.concatenate([x[:1]] * (-(-n // T)), axis=1)[:, :n] for x in (q, k, v)]
    full = jnp.asarray([n], jnp.int32)
    for name, times in timed.items():
        times.append(milliseconds(CALLS[name], *rows, full))

figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name, times in timed.items():
    axis.plot(LENGTHS, times, marker="o", label=name)
axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=f"attention on {jax.devices()[0].device_kind}")
axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
axis.grid(alpha=0.3)
axis.legend()
plt.show()
for name, times in timed.items():
    print(f"{name}:", ", ".join(f"{time:.1f} ms" for time in times))
