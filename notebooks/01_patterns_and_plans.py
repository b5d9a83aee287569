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
# # 01 · Patterns and plans
#
# A long prompt makes attention expensive: every query looks at every earlier key. But heads are creatures of habit.
# Some look at the first tokens and at their neighbours, some at a few columns and diagonals, some at scattered blocks.
# MInference names these habits (A-shape, vertical-slash, block-sparse) and, for each prompt anew, finds the few keys
# that matter. This notebook shows what real heads of SmolLM2-135M look at while they read *Persuasion*, what a **plan**
# visits in its place, and what is lost. It reads 512 tokens, so that it runs anywhere in a minute; with
# `NOTEBOOK_TOKENS=4096` plans are sparser and the pictures finer.

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

from minference_jax import AShape, BlockSparse, Llama, VerticalSlash, capture_qkv, load_tokenizer, make_plan, recall
from minference_jax.checkpoints.demo_model import fetch_demo_model
from minference_jax.data import load_text
from minference_jax.viz import head_picture

TOKENS = int(os.environ.get("NOTEBOOK_TOKENS", "512"))
CACHE = Path(os.environ.get("MINFERENCE_CACHE") or Path.home() / ".cache" / "minference_jax")

# %% [markdown]
# The model is small (269 MB) and is fetched once. `capture_qkv` hands out the queries, keys and values of each layer;
# three layers are enough here.

# %%
path = fetch_demo_model(CACHE / "SmolLM2-135M-Instruct")
model = Llama.from_pretrained(path, dtype="float32")
tokens = jnp.asarray([load_tokenizer(path).encode(load_text())[2000 : 2000 + TOKENS]])
layers = {}
for index, (q, k, _) in enumerate(capture_qkv(model, tokens)):
    if index in (0, 4, 14):
        layers[index] = q, k
    if index == 14:
        break

# %% [markdown]
# ## Which pattern fits which head?
#
# Each pattern gets budgets that cost about the same. *Density* is the share of (query, key) pairs that the plan visits,
# *recall* the share of the head's softmax mass that lies on them. Every dot is a head.

# %%
scale = TOKENS / 2048
PATTERNS = {
    "A-shape": AShape(sink=32, window=max(65, int(385 * scale))),
    "vertical-slash": VerticalSlash(columns=max(16, int(160 * scale)), tiles=max(1, int(4 * scale)), probes="spread"),
    "block-sparse": BlockSparse(max(3, int(8 * scale))),
}


@jax.jit
def measure(q, k):
    """Density and recall [patterns, heads]."""
    plans = [make_plan(q, k, pattern) for pattern in PATTERNS.values()]
    return (
        jnp.stack([plan.density(TOKENS, TOKENS)[0] for plan in plans]),
        jnp.stack([recall(q, k, plan)[0] for plan in plans]),
    )


measured = {index: [np.asarray(x) for x in measure(q, k)] for index, (q, k) in layers.items()}
figure, axes = plt.subplots(1, len(measured), figsize=(10, 3.2), sharey=True, layout="constrained")
for axis, (index, (density, held)) in zip(axes, measured.items(), strict=True):
    for row, name in enumerate(PATTERNS):
        axis.scatter(density[row], held[row], label=name, alpha=0.8)
    axis.set(title=f"layer {index}", xlabel="density", xlim=(0, 1.1 * density.max()), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
axes[0].set_ylabel("recall")
axes[0].legend(loc="lower right")
plt.show()

# %% [markdown]
# Higher is better, further left is cheaper. Early layers look around widely; in the middle layers most heads live on
# the sink (the very first token) and on their neighbours, so even the plain A-shape keeps nearly everything.

# %% [markdown]
# ## Pictures of three heads
#
# The head that each pattern serves best, compared with the others. Left: what dense attention does (bright is much).
# Middle: what the plan visits. Right: what is lost.

# %%
best = {}
for row, name in enumerate(PATTERNS):
    others = [other for other in range(len(PATTERNS)) if other != row]
    gains = {
        (index, head): held[row, head] - max(held[other, head] for other in others)
        for index, (_, held) in measured.items()
        for head in range(held.shape[1])
    }
    best[name] = max(gains, key=gains.__getitem__)

figure, axes = plt.subplots(len(best), 3, figsize=(9, 2.8 * len(best)), layout="constrained")
for row, (name, (index, head)) in zip(axes, best.items(), strict=True):
    picture = head_picture(*layers[index], PATTERNS[name], head)
    extent = (0, TOKENS, TOKENS, 0)
    norm = LogNorm(1e-5, 1)
    row[0].imshow(np.maximum(picture.dense, 1e-5), norm=norm, cmap="magma", extent=extent)
    row[1].imshow(picture.visited, cmap="Blues", vmin=0, vmax=1, extent=extent)
    row[2].imshow(np.maximum(picture.lost, 1e-5), norm=norm, cmap="magma", extent=extent)
    row[0].set(title=f"layer {index}, head {head}: dense", ylabel=f"{name}\nquery")
    row[1].set(title=f"visited: density {picture.density:.2f}")
    row[2].set(title=f"lost: recall {picture.recall:.3f}")
    for axis in row:
        axis.set_xlabel("key")
plt.show()

# %% [markdown]
# ## What a plan is
#
# A plan is a handful of small integer arrays; the kernel reads them and nothing else. Key **columns** that every later
# query sees, **bands** at fixed distances before each tile of 128 queries, **blocks** for single query tiles. Heads of
# all kinds share one plan, and one launch.

# %%
index, head = best["vertical-slash"]
plan = make_plan(*layers[index], PATTERNS["vertical-slash"])
print("columns ", plan.columns[0, head, :12], "…")
print("bands   ", plan.bands[0, head, : int(plan.band_count[0, head])])
print("the whole plan of", model.config.num_heads, "heads takes", sum(x.nbytes for x in jax.tree.leaves(plan)), "bytes")
print("as a dense mask it would take", model.config.num_heads * TOKENS * TOKENS, "bytes")
