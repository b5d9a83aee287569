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
# # 03 · Converted weights against PyTorch
#
# A sparse method is only as good as the dense model under it. Here the same checkpoint reads the same text twice, with
# Hugging Face PyTorch and with this package, and every layer, every logit and the continuation are compared. PyTorch
# runs in an interpreter of its own: `pip install torch transformers safetensors` somewhere, and name that interpreter
# in `MINFERENCE_TORCH_PYTHON` (or install them beside this notebook).

# %%
import os
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt

from minference_jax import Llama, VerticalSlash, load_tokenizer
from minference_jax.checkpoints.demo_model import fetch_demo_model
from minference_jax.compare import compare
from minference_jax.data import load_text

TOKENS = int(os.environ.get("NOTEBOOK_TOKENS", "256"))
CACHE = Path(os.environ.get("MINFERENCE_CACHE") or Path.home() / ".cache" / "minference_jax")

# %%
path = fetch_demo_model(CACHE / "SmolLM2-135M-Instruct")
tokenizer = load_tokenizer(path)
ids = tokenizer.encode(load_text())[:TOKENS]
dense = compare(path, ids, max_new_tokens=12)
print(f"{dense.tokens} tokens, {dense.dtype}")
print("PyTorch goes on:", tokenizer.decode(dense.greedy_torch[0]))
print("JAX goes on:    ", tokenizer.decode(dense.greedy_ours[0]))

# %% [markdown]
# ## Layer by layer
#
# Each dot is one layer's output, averaged over all positions: how large it is, and how far the two differ. The distance
# between the two curves is what float32 rounding allows; a wrong rotation, norm or head order would close it at once.

# %%
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
names = [layer.name for layer in dense.layers]
axis.plot(names, [layer.scale for layer in dense.layers], marker=".", label="size of PyTorch's output (RMS)")
axis.plot(names, [layer.rms for layer in dense.layers], marker=".", label="difference (RMS)")
axis.set(
    yscale="log", title=f"largest logit difference {dense.logit_max:.1e} (logits are about {dense.logit_scale:.0f})"
)
axis.set_xticks(range(0, len(names), 4), names[::4], rotation=30)
axis.legend()
axis.grid(alpha=0.3)
plt.show()
print(
    "same most likely token at",
    f"{dense.argmax_agreement:.2%}",
    "of positions; within tolerance:",
    dense.within_tolerance,
)
assert dense.within_tolerance, dense.failures

# %% [markdown]
# ## And what sparsity changes
#
# The same text with a sparse prefill on our side: the outputs now differ by what the plan leaves out. Perplexity says
# what that costs.

# %%
pattern = VerticalSlash(columns=max(16, TOKENS * 3 // 32), tiles=max(1, TOKENS // 512), probes="spread")
sparse = Llama.from_pretrained(path, dtype="float32", patterns=pattern)
scores, info = sparse.token_log_likelihoods(jnp.asarray([ids]), return_info=True)
perplexity = float(jnp.exp(-scores[0, 1:].mean()))
print(f"density {info.density.mean():.2f}, recall {info.recall.mean():.2f}")
bars = {"PyTorch": dense.perplexity_torch, "JAX, dense": dense.perplexity_ours, "JAX, sparse": perplexity}
figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
drawn = axis.bar(list(bars), list(bars.values()), color=["grey", "tab:blue", "tab:orange"])
axis.bar_label(drawn, fmt="%.3f")
axis.set(ylabel="perplexity", ylim=(0, 1.15 * max(bars.values())))
plt.show()
assert abs(dense.perplexity_ours / dense.perplexity_torch - 1) < 1e-5

# %% [markdown]
# For answers rather than text, `minference-jax compare --task needle-magic-raw` gives both sides the same prompts with
# a right answer and scores them alike.
