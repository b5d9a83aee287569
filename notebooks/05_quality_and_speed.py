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
# # 05 · Quality and speed
#
# What does it cost to look at a third of the keys, and what does it gain? This notebook hides facts in a novel and
# asks for them, with dense attention, with MInference's dynamic plan, and with a fixed window of the same size
# (A-shape, also known as StreamingLLM). Then it takes the time. On a GPU, set `NOTEBOOK_LENGTHS=1024,4096,8192` and
# more samples.

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

LENGTHS = [int(n) for n in os.environ.get("NOTEBOOK_LENGTHS", "512,1024").split(",")]
SAMPLES = int(os.environ.get("NOTEBOOK_SAMPLES", "5"))
DENSITY = 0.35
CACHE = Path(os.environ.get("MINFERENCE_CACHE") or Path.home() / ".cache" / "minference_jax")

# %%
path = fetch_demo_model(CACHE / "SmolLM2-135M-Instruct")
model = Llama.from_pretrained(path, dtype="bfloat16" if jax.default_backend() == "gpu" else "float32")
tokenizer = load_tokenizer(path)
methods = [Method(name, METHODS[name]) for name in ("dense", "minference", "a-shape")]
for length in LENGTHS:
    print(length, "tokens:", methods[1].choose(model, length, DENSITY))

# %% [markdown]
# ## Is the needle found?
#
# One row for each depth at which the fact lies, one column for each prompt length. Green is found, red is lost. The
# window finds what lies at its end (or at the very start, in the sink), and nothing between.

# %%
tasks = make_tasks(["needle-magic-raw"])
results = evaluate(
    model, tokenizer, tasks, lengths=LENGTHS, methods=methods, samples=SAMPLES, batch=SAMPLES, density=DENSITY
)
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
