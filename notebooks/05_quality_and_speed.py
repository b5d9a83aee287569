# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · Quality and speed
#
# What does it cost to look at a third of the keys, and what does it gain? This notebook hides facts in a novel and
# asks for them, with dense attention, with MInference's dynamic plan, and with a fixed window that visits about as many
# keys (A-shape, also known as StreamingLLM). Then it takes the time. On a GPU, set `NOTEBOOK_LENGTHS=1024,4096,8192`
# and `NOTEBOOK_SAMPLES=50`.

# %%
import os
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt

from minference_jax import Llama, load_tokenizer
from minference_jax.eval.methods import METHODS, Method
from minference_jax.eval.plots import lines, needle_map
from minference_jax.eval.report import markdown
from minference_jax.eval.runner import evaluate
from minference_jax.eval.tasks import make_tasks
from minference_jax.models.demo_model import fetch_demo_model

LENGTHS = [int(n) for n in os.environ.get("NOTEBOOK_LENGTHS", "768,1024").split(",")]
SAMPLES = int(os.environ.get("NOTEBOOK_SAMPLES", "3"))
DENSITY = 0.35
CACHE = Path(os.environ.get("MINFERENCE_CACHE") or Path.home() / ".cache" / "minference_jax")
# %matplotlib inline

# %%
path = fetch_demo_model(CACHE / "SmolLM2-135M-Instruct")
on_gpu = jax.default_backend() == "gpu"
model = Llama.from_pretrained(path, dtype="bfloat16" if on_gpu else "float32")
tokenizer = load_tokenizer(path)


def wider_window(model, length, density):
    """A-shape's budget comes in whole tiles, and columns cost more than expected: let the window visit no less."""
    return METHODS["a-shape"](model, length, density + 0.05)


methods = [Method(name, METHODS[name]) for name in ("dense", "minference")] + [Method("a-shape", wider_window)]
for length in LENGTHS:
    print(length, "tokens:", methods[1].choose(model, length, DENSITY))

# %% [markdown]
# ## Is the needle found?
#
# One row for each depth at which the fact lies, one column for each prompt length (on a CPU only the longest). Green
# is found, red is lost. Five samples have their facts in the first half of the text, ten at all depths. The window
# loses most of what lies farther back than it reaches; a fact may still travel in several steps, from layer to layer.

# %%
tasks = make_tasks(["needle-magic-raw"])
options = {"samples": SAMPLES, "batch": min(SAMPLES, 10), "density": DENSITY}
results = evaluate(model, tokenizer, tasks, lengths=LENGTHS if on_gpu else LENGTHS[-1:], methods=methods, **options)
needle_map(results)

# %% [markdown]
# ## Is the text still understood?
#
# Perplexity is kinder: most tokens can be guessed from their neighbours, so even the window does well. It shows damage
# to the model as a whole, not the loss of one distant fact.

# %%
texts = evaluate(
    model, tokenizer, make_tasks(["ppl"]), lengths=LENGTHS, methods=methods, samples=2, batch=2, density=DENSITY
)
lines(texts, "perplexity")

# %%
print(markdown([*results, *texts]))

# %% [markdown]
# ## And the time?
#
# To read the windows of text again, programs compiled: one prefill of two prompts, and the logits of every token. On a
# CPU, and for a model this small, the projections take most of the time at short lengths; attention grows with the
# square of the length, and the plan's share of it shrinks. The README has a GPU's figures where this matters.

# %%
seconds = {method.name: [] for method in methods}
for length in LENGTHS:
    for method in methods:
        one = {"lengths": [length], "methods": [method], "samples": 2, "batch": 2, "density": DENSITY}
        started = time.perf_counter()
        evaluate(model, tokenizer, make_tasks(["ppl"]), **one)
        seconds[method.name].append(time.perf_counter() - started)

figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name, times in seconds.items():
    axis.plot(LENGTHS, times, marker="o", label=name)
axis.set(xlabel="prompt tokens", ylabel="seconds for two prompts", ylim=(0, None))
axis.legend()
axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Which budget, and why?
#
# Measured on an H100 80GB HBM3 in bfloat16 (driver 580.159, jax 0.11.2; dense and A-shape at commit 1e574e6, searched
# at 48d8234), SmolLM2-135M-Instruct, prompts of *Northanger Abbey*, which no pattern was searched on, 50 of each task,
# with 95 % intervals. Needles: four tasks, a number or an address, in raw text or in a chat. The next column: a pass
# key or ten digits in repeated sentences. All budgets were brought to about a third of the keys on another text.
#
# | tokens | method | density | needles, % | pass key, number, % | perplexity |
# |---|---|---|---|---|---|
# | 1,024 | dense | 1 | 98.5 [96, 99] | 96 [90, 98] | 30.51 |
# | | patterns searched at 1,024 | .344 | 96.5 [93, 98] | 92 [85, 96] | 31.08 |
# | | patterns searched at 4,096, scaled | .339 | 95.5 [92, 98] | 98 [93, 99] | 34.91 |
# | | A-shape | .290 | 20.5 [15, 27] | 17 [11, 26] | 33.51 |
# | 4,096 | dense | 1 | 96 [92, 98] | 89 [81, 94] | 28.22 |
# | | patterns searched at 4,096, scaled | .349 | 95.5 [92, 98] | 92 [85, 96] | 28.31 |
# | | A-shape (two of the four needles) | .340 | 20 [13, 29] | 20 [13, 29] | 29.16 |
# | 8,192 | dense | 1 | 81 [75, 86] | 88 [80, 93] | 27.50 |
# | | patterns searched at 4,096, scaled | .342 | 80 [74, 85] | 88 [80, 93] | 27.54 |
# | | A-shape (three of the four needles) | .340 | 20.7 [15, 28] | 20 [13, 29] | 28.15 |
#
# On *Persuasion* at 4,096 tokens (commit d016752), eight RULER tasks: 40.9 dense, 39.9 with searched patterns at .32
# and with one budget for all heads at .25, 25.9 with A-shape at .34. That one budget costs 5.1 % of perplexity, the
# searched patterns at the same density 1.2 %. RULER with the shipped patterns on *Northanger Abbey* (−1.3 points at
# 4,096 tokens, −1.6 at 8,192), the paper's ablation and a qwen2 model at up to 32,768 tokens are in `quality.md`.
#
# - **Columns find needles.** With as many keys as A-shape, any plan that looks for columns finds the facts that a fixed
#   window loses: A-shape is right where the fact lies in its window, a fifth of the cases.
# - **Search, then spend about a third of the keys.** From 4,096 tokens on that costs 0.1 to 0.3 % of perplexity.
# - **Search at the length that you use.** Longer prompts can be served by scaling the budgets
#   (`search.scale_to_density`). Scaled down to 1,024 tokens they lose 14 % of perplexity, where patterns that were
#   searched there lose 1.9 %.
# - **Short prompts want dense attention.** At 1,024 tokens the diagonal and one tile before it are 23 % of all pairs
#   already, and a third of them is too little for this model.
