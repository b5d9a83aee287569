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
# # 04 · Search: a pattern for each head
#
# Which pattern suits which head, and how large must its budgets be? That is searched once per model, offline. Each
# candidate's budgets are scaled in each head until its plan costs what the target allows; then the head's *output* with
# each candidate is compared with dense attention's, and the least error wins. This notebook searches the first layers
# of SmolLM2-135M on a page of *Persuasion*, and then looks at the patterns of all 30 layers that come with the package.

# %%
import dataclasses
import os
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from minference_jax import AShape, Llama, VerticalSlash, load_tokenizer, preset
from minference_jax.checkpoints.demo_model import fetch_demo_model
from minference_jax.data import load_text
from minference_jax.search import search_patterns
from minference_jax.viz.patterns import colours

TOKENS = int(os.environ.get("NOTEBOOK_TOKENS", "512"))
LAYERS = 2 if TOKENS < 1024 else 4
TARGET = 0.35 if TOKENS >= 1024 else 0.6  # the diagonal alone is much of a short prompt
CACHE = Path(os.environ.get("MINFERENCE_CACHE") or Path.home() / ".cache" / "minference_jax")

# %% [markdown]
# A search needs only the layers that it searches: here, a model of the first few.

# %%
path = fetch_demo_model(CACHE / "SmolLM2-135M-Instruct")
whole = Llama.from_pretrained(path, dtype="float32")
params = {name: x[:LAYERS] if name.startswith("layers.") else x for name, x in whole.params().items()}
model = Llama.from_params(dataclasses.replace(whole.config, num_layers=LAYERS), params)
samples = jnp.asarray([load_tokenizer(path).encode(load_text())[2000 : 2000 + TOKENS]])

# %%
CANDIDATES = (
    AShape(64, 4096),
    VerticalSlash(512, tiles=64, probes="spread"),
    VerticalSlash(4096, tiles=32, probes="spread"),
)


def tell(done, total):
    print(f"{done} of {total} layers")


found = search_patterns(model, samples, target=TARGET, candidates=CANDIDATES, progress=tell)
for index, layer in enumerate(found):
    print(f"layer {index}:", layer[0])

# %% [markdown]
# ## What the search gains
#
# The same search with one candidate only, and with all heads at the same cost, is what a uniform setting can do at
# best. Every dot is a head: its cost, and how far its output is from dense attention's. Heads that are easy give up
# keys to heads that need them.

# %%
alone = search_patterns(model, samples, target=TARGET, candidates=CANDIDATES[:1], budgets="equal")
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for patterns, label in ((alone, "a window for every head"), (found, "searched")):
    error, cost = np.asarray(patterns.scores).ravel(), np.asarray(patterns.densities).ravel()
    axis.scatter(cost, error, label=f"{label}: error {error.mean():.3f} at density {cost.mean():.3f}", alpha=0.8)
axis.set(xlabel="density", ylabel="relative error of the head's output", xlim=(0, None), ylim=(0, None))
axis.legend()
axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## The whole model
#
# The patterns that come with the package, searched at 4,096 tokens. Left: which kind each head has, the darker the
# more keys. Right: the share of the softmax mass that its plan keeps.

# %%
shipped = preset("smollm2-135m-instruct", whole.config.num_layers, whole.config.num_heads)
density = None if shipped.densities is None else np.asarray(shipped.densities)
figure, axes = plt.subplots(1, 2, figsize=(8, 6), layout="constrained")
axes[0].imshow(colours(shipped, density), aspect="auto")
axes[0].set(title="kind of each head", xlabel="head", ylabel="layer")
for kind, colour in {p.label(): p.colour() for p in shipped.distinct()}.items():
    axes[0].plot([], [], "s", color=colour, label=kind)
axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=8)
image = axes[1].imshow(np.asarray(shipped.recalls), aspect="auto", cmap="viridis")
axes[1].set(title=f"recall, mean {np.mean(shipped.recalls):.3f}", xlabel="head")
figure.colorbar(image, ax=axes[1])
plt.show()
print(Counter(pattern.label() for layer in shipped for pattern in layer))
