"""One head on one prompt: its dense attention, what its plan visits, and what is lost, side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minference_jax.attention import make_plan
from minference_jax.extras import naming_extra
from minference_jax.index.recall import column_flags
from minference_jax.patterns import Pattern
from minference_jax.viz.figure import check_path, new_figure, save
from pallas_kernels.plan import QUERY_TILE, SparsePlan, visited_keys

CELLS = 256
"""Rows and columns of a picture, at most: a cell is a mean over so many queries, a sum over so many keys."""


class HeadPicture(NamedTuple):
    """Of cells of `block` queries × `block` keys; float32 `[cells, cells]`, above the diagonal 0.

    - `dense`: softmax mass that the cell's queries give the cell's keys, mean over the queries.
    - `visited`: share of the cell's (query, key) pairs that the plan visits. `lost`: the mass of those it does not.
    - `recall`: 1 − the mean mass lost. `density`: visited / causal pairs.
    """

    dense: Float[np.ndarray, "i j"]
    visited: Float[np.ndarray, "i j"]
    lost: Float[np.ndarray, "i j"]
    block: int
    recall: float
    density: float


def head_picture(
    q: Float[Array, "1 t n h"], k: Float[Array, "1 t k h"], pattern: Pattern | str, head: int
) -> HeadPicture:
    """Attention and plan of query head `head` of one layer and one prompt, in cells.

    Memory: `block` rows of scores at a time, and a megabyte; nothing of size t × t.

    Raises ValueError for more than one prompt or for a head that there is not.
    """
    t, heads = q.shape[1], q.shape[2]
    if q.shape[0] != 1:
        raise ValueError(f"q must hold one prompt, got {q.shape}")
    if not 0 <= head < heads:
        raise ValueError(f"head must be in 0 … {heads - 1}, got {head}")
    group = head // (heads // k.shape[2])
    q, k = q[:, :, head : head + 1], k[:, :, group : group + 1]
    block = max(8, 2 ** int(np.ceil(np.log2(t / CELLS))))  # 8 … 128 divide a query tile
    if block > QUERY_TILE:
        raise ValueError(f"pictures show up to {CELLS * QUERY_TILE} tokens, got {t}")
    plan = make_plan(q, k, pattern)
    dense, visited, lost = (np.asarray(x) for x in _cells(q[0, :, 0], k[0, :, 0], plan, block))
    recall = 1 - float(lost.sum(1).repeat(block)[:t].mean())
    return HeadPicture(dense, visited, lost, block, recall, float(plan.density(t, t)[0, 0]))


@partial(jax.jit, static_argnames="block")
def _cells(q: Float[Array, "t h"], k: Float[Array, "t h"], plan: SparsePlan, block: int) -> tuple[Array, Array, Array]:
    t = q.shape[0]
    count = -(-t // block)
    keys = jnp.arange(t, dtype=jnp.int32)
    columns = column_flags(plan, t, (1, 1))[0, 0]
    rows_of = jnp.pad(q, ((0, count * block - t), (0, 0))).reshape(count, block, -1)

    def pooled(x: Float[Array, "r t"]) -> Float[Array, " j"]:
        return jnp.pad(x.sum(0), (0, count * block - t)).reshape(count, block).sum(1)

    def one(at: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        i, rows = at
        position = i * block + jnp.arange(block, dtype=jnp.int32)
        seen = columns | visited_keys(plan, i * block // QUERY_TILE, t, jnp.int32(0), (1, 1))[0, 0]
        valid = position[:, None] < t
        causal = (keys <= position[:, None]) & valid
        scores = jnp.einsum("rh,sh->rs", rows, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jnp.where(causal, jax.nn.softmax(jnp.where(keys <= position[:, None], scores, -jnp.inf), -1), 0)
        inside = (causal & seen).astype(jnp.float32)
        here = jnp.maximum(valid.sum(), 1).astype(jnp.float32)
        pairs = jnp.maximum(pooled(causal.astype(jnp.float32)), 1)
        return pooled(weights) / here, pooled(inside) / pairs, pooled(weights * (1 - inside)) / here

    return jax.lax.map(one, (jnp.arange(count, dtype=jnp.int32), rows_of))


def plot_head(picture: HeadPicture, path: str | Path, *, title: str = "") -> None:
    """Draws `head_figure` to a .png, .pdf or .svg file. Raises ValueError for another suffix."""
    check_path(path)
    save(head_figure(picture, title=title), path)


def head_figure(picture: HeadPicture, *, title: str = "") -> Any:
    """A matplotlib figure of dense attention, plan and loss; mass on one logarithmic scale.

    Raises ModuleNotFoundError without matplotlib.
    """
    figure = new_figure(13, 4.6)
    with naming_extra("a picture"):
        from matplotlib.colors import LogNorm

    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    tokens = picture.block * len(picture.dense)
    scale = LogNorm(1e-5, max(float(picture.dense.max()), 1e-4))
    where: dict[str, Any] = {"extent": (0, tokens, tokens, 0), "interpolation": "nearest"}
    above = np.triu(np.ones_like(picture.dense, dtype=bool), 1)
    shown = (
        ("dense attention", picture.dense, {"norm": scale, "cmap": "magma"}),
        (f"visited: density {picture.density:.3f}", picture.visited, {"vmin": 0, "vmax": 1, "cmap": "Blues"}),
        (f"lost: recall {picture.recall:.4f}", picture.lost, {"norm": scale, "cmap": "magma"}),
    )
    for axis, (name, values, style) in zip(axes, shown, strict=True):
        values = np.ma.masked_array(np.maximum(values, 1e-5) if "norm" in style else values, above)
        image = axis.imshow(values, **where, **style)
        axis.set(title=name, xlabel="key")
        label = "share of pairs" if "vmin" in style else "softmax mass of a cell"
        figure.colorbar(image, ax=axis, shrink=0.8, label=label)
    axes[0].set_ylabel("query")
    if title:
        figure.suptitle(title)
    return figure
