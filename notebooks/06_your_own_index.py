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
# # 06 · Your own index
#
# An *index* looks at a prompt's queries and keys and says which keys are worth a visit. If you have an idea for one,
# this is all there is to write: a `PlanBuilder` with a method `build`, in plain `jax.numpy`. The kernels, the model,
# the pictures and the evaluation take it as they take the patterns that come with the package.

# %%
import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from minference_jax import AShape, Llama, PlanBuilder, capture_qkv, load_tokenizer, make_plan, recall
from minference_jax.checkpoints.demo_model import fetch_demo_model
from minference_jax.data import load_text
from minference_jax.eval.methods import METHODS, Method
from minference_jax.eval.report import markdown
from minference_jax.eval.runner import evaluate
from minference_jax.eval.tasks import make_tasks
from minference_jax.viz import head_figure, head_picture
from pallas_kernels import SparsePlan

TOKENS = int(os.environ.get("NOTEBOOK_TOKENS", "512"))
LENGTHS = [int(n) for n in os.environ.get("NOTEBOOK_LENGTHS", "256").split(",")]
CACHE = Path(os.environ.get("MINFERENCE_CACHE") or Path.home() / ".cache" / "minference_jax")
# %matplotlib inline

# %% [markdown]
# ## The idea, in fifteen lines
#
# The last rows of a prompt often hold the question. So let their mean score all keys, once for each head; keep the
# keys that score highest as *columns*, which every later query sees, and beside them the nearest tile of 64 keys.
#
# A plan holds `columns` (positions), `bands` (distances in front of a tile of 128 queries) and `blocks` (numbers of key
# tiles), each ascending and with a count. The diagonal need not be named. Widths are static: they come from the fields,
# not from the prompt. `lengths` says where each sequence ends, since shorter ones are padded on the right.


# %%
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AskedFor(PlanBuilder):
    """The `columns` keys that the mean of the last 64 queries scores highest, and the nearest tile."""

    columns: int

    def build(self, q, k, *, lengths, q_offset, scale):
        (b, t, n, h), (s, kv_heads) = q.shape, k.shape[1:3]
        last = jnp.clip(lengths[:, None] - q_offset - 64 + jnp.arange(64), 0, t - 1)
        asking = jnp.take_along_axis(q, last[:, :, None, None], axis=1).mean(1).reshape(b, kv_heads, -1, h)
        scores = jnp.einsum("bkgh,bskh->bkgs", asking, k).reshape(b, n, s)
        scores = jnp.where(jnp.arange(s) < lengths[:, None, None], scores, -jnp.inf)
        columns = jnp.sort(jax.lax.top_k(scores, self.columns)[1].astype(jnp.int32))
        bands = jnp.full((b, n, 1), 64, jnp.int32)
        return SparsePlan(columns, jnp.full((b, n), self.columns, jnp.int32), bands, jnp.ones((b, n), jnp.int32))


# %% [markdown]
# ## Its picture
#
# Dense attention of one head of SmolLM2-135M that reads *Persuasion*, what the plan visits, and what is lost.

# %%
path = fetch_demo_model(CACHE / "SmolLM2-135M-Instruct")
model, tokenizer = Llama.from_pretrained(path, dtype="float32"), load_tokenizer(path)
tokens = jnp.asarray([tokenizer.encode(load_text())[2000 : 2000 + TOKENS]])
q, k, _ = next(qkv for layer, qkv in enumerate(capture_qkv(model, tokens)) if layer == 4)
mine = AskedFor(columns=TOKENS // 8)
head_figure(head_picture(q, k, mine, head=2), title="layer 4, head 2")

# %% [markdown]
# ## Recall and density, over the heads of a layer
#
# *Density* is the share of (query, key) pairs that the plan visits, *recall* the share of dense attention's softmax
# mass on them. A recall says something only beside the recall of another rule that visits as much: here a fixed mask,
# the first eight keys and the nearest tile.

# %%
for pattern in (mine, AShape(sink=8, window=65)):
    plan = make_plan(q, k, pattern)
    density, kept = plan.density(TOKENS, TOKENS).mean(), recall(q, k, plan)
    print(f"{pattern}\n  density {density:.3f}, recall {kept.mean():.3f}, worst head {kept.min():.3f}")

# %% [markdown]
# ## Its row in an evaluation
#
# A `Method` is a name for reports and a function that chooses a pattern for a length and a density. The report warns
# where sparse methods visited shares that differ by more than a tenth: the one that visits more would win by that.
# Perplexity of two texts of 256 tokens shows how it is done and says little; for an answer, take the tasks and lengths
# that you care about (`05_quality.ipynb`).

# %%
methods = [
    Method("minference", METHODS["minference"]),
    Method("asked for", lambda model, length, density: AskedFor(columns=length // 8)),
]
options = {"samples": 2, "batch": 2, "density": 0.35}
results = evaluate(model, tokenizer, make_tasks(["ppl"]), lengths=LENGTHS, methods=methods, **options)
print(markdown(results))

# %% [markdown]
# ## And then
#
# - Heads may differ: `HeadPatterns` takes builders and patterns side by side, one for each head.
# - Rules with budgets that a search may scale are a family of patterns: one file, see `CONTRIBUTING.md`.
# - `plan.to_mask(...)` is the slow truth of what a plan visits; test against it, with padding and a `q_offset`.
# - On a GPU, look at what your index costs beside the attention: `minference_jax.bench.operator.time_operators`.
