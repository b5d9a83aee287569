"""What sparse prefill is compared with, each as a plan on the shared kernel: fixed masks, old indices, an oracle.

A-shape (StreamingLLM) and the single patterns are patterns of this package and need nothing here.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from minference_jax.attention import make_plan
from minference_jax.index import select
from minference_jax.index.weights import probe_weights
from minference_jax.patterns import Pattern, PlanBuilder
from pallas_kernels.plan import KEY_TILE, QUERY_TILE, SparsePlan, num_key_tiles, num_query_tiles
from pallas_kernels.plan_builders import compact


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Dilated(PlanBuilder):
    """The first `sink` keys, a window of `near` keys, and of the `far` keys before it every `stride`-th key tile.

    The original's "dilated" baseline is `near=0`, its "strided" one has a dense window next to the diagonal. There
    every second key is taken; here every second tile, as single keys would fill their tiles anyway.

    Source: MInference (arXiv 2407.02490) §4, after "Generating Long Sequences with Sparse Transformers".
    """

    sink: int = 1024
    near: int = 0
    far: int = 8192
    stride: int = 2

    def build(self, q: Array, k: Array, *, lengths: Array, q_offset: Array, scale: float) -> SparsePlan:
        return _fixed(q, k, self.sink, np.asarray(self.bands(), np.int32))

    def bands(self) -> list[int]:
        """The distances of its key tiles."""
        near, end = -(-self.near // KEY_TILE), -(-(self.near + self.far) // KEY_TILE)
        return [KEY_TILE * i for i in (*range(1, near + 1), *range(near + self.stride, end + 1, self.stride))]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Longformer(PlanBuilder):
    """A window and global tokens: the first `sink`, which all see, and the last `question`, which see all.

    In a causal model a global token at the start is a column and one at the end a row; without `question` this is
    A-shape. The last rows are rounded out to query tiles.

    Source: Longformer (arXiv 2004.05150) §3.1, where a question's tokens are global.
    """

    window: int
    sink: int = 64
    question: int = 64

    def build(self, q: Array, k: Array, *, lengths: Array, q_offset: Array, scale: float) -> SparsePlan:
        flags = _question_tiles(q, k, self.question, lengths, q_offset)
        return _with_tiles(_fixed(q, k, self.sink, _window_bands(self.window)), flags, q.shape[2])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BigBird(PlanBuilder):
    """Longformer's window and global tokens, and `random` key tiles for each query tile, other ones for each head.

    The draw depends on `seed`, head and position only, so chunks and batches see the same tiles.

    Source: Big Bird (arXiv 2007.14062) §2.
    """

    window: int
    sink: int = 64
    question: int = 64
    random: int = 4
    seed: int = 0

    def build(self, q: Array, k: Array, *, lengths: Array, q_offset: Array, scale: float) -> SparsePlan:
        n, tiles = q.shape[2], num_key_tiles(k.shape[1])
        tile = q_offset // QUERY_TILE + jnp.arange(num_query_tiles(q.shape[1]), dtype=jnp.int32)
        keys = jax.random.split(jax.random.key(self.seed), n)
        draw = jax.vmap(lambda key, i: jax.random.uniform(jax.random.fold_in(key, i), (self.random,)), (None, 0))
        share = jax.vmap(draw, (0, None))(keys, tile)  # [n, i, random]
        past = tile * (QUERY_TILE // KEY_TILE)
        drawn = jnp.floor(share * past[:, None].astype(jnp.float32)).astype(jnp.int32)
        flags = jax.nn.one_hot(drawn, tiles, dtype=jnp.bool_).any(-2) & (past > 0)[:, None]
        flags = flags[None] | _question_tiles(q, k, self.question, lengths, q_offset)
        return _with_tiles(_fixed(q, k, self.sink, _window_bands(self.window)), flags, n)


@partial(jax.tree_util.register_dataclass, data_fields=["plan"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class StaticPlan(PlanBuilder):
    """A plan made elsewhere, for every prompt: the "static" ablation keeps each head's index of another prompt.

    `plan` has a batch axis of 1 and, for a model, a leading layer axis; columns and bands only, since blocks belong to
    one prompt's query tiles.

    Source: MInference (arXiv 2407.02490) §4, "Ours w/ static"; its released code keeps one head's index per layer.
    """

    plan: SparsePlan

    @classmethod
    def of_prompt(cls, model: Any, tokens: Int[Array, "1 t"], pattern: Pattern | str) -> StaticPlan:
        """The index that `pattern` gives each head of each layer of `model` on one prompt."""
        from minference_jax.models.capture import capture_qkv

        plans = [make_plan(q, k, pattern) for q, k, _ in capture_qkv(model, tokens)]
        if plans[0].blocks is not None:
            raise ValueError("pattern must not be block-sparse: its blocks belong to the query tiles of one prompt")
        return cls(jax.tree.map(lambda *layers: jnp.stack(layers), *plans))

    def build(self, q: Array, k: Array, *, lengths: Array, q_offset: Array, scale: float) -> SparsePlan:
        return jax.tree.map(lambda part: jnp.broadcast_to(part, (q.shape[0], *part.shape[1:])), self.plan)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TopKOracle(PlanBuilder):
    """The key tiles that hold most of the dense attention, at a given density: what no index can beat with tiles.

    Each head spends its tiles where they hold most, over all its query tiles together. As expensive as dense
    attention, and more: for comparison only. The density reached is at most `density` (or that of the diagonal).
    """

    density: float

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"TopKOracle: density must be in (0, 1], got {self.density}")

    def build(self, q: Array, k: Array, *, lengths: Array, q_offset: Array, scale: float) -> SparsePlan:
        mass = tile_masses(q, k, lengths=lengths, q_offset=q_offset, scale=scale)  # [b, n, i, kt]
        tile = jnp.arange(mass.shape[-1], dtype=jnp.int32)
        first = (q_offset + QUERY_TILE * jnp.arange(mass.shape[2], dtype=jnp.int32))[:, None]
        rows = jnp.clip(lengths[:, None, None] - first, 0, jnp.minimum(QUERY_TILE, q_offset + q.shape[1] - first))
        past = (tile < first // KEY_TILE) & (rows > 0)  # [b, i, kt]
        cells = rows.astype(jnp.float32)
        diagonal = jnp.sum(cells * (cells + 1) / 2, axis=(1, 2))
        causal = jnp.sum(cells * first.astype(jnp.float32), axis=(1, 2)) + diagonal
        # A tile of a full query tile costs 128 · 64 cells; the last query tile's are cheaper and count in full.
        budget = jnp.maximum(self.density * causal - diagonal, 0) / (QUERY_TILE * KEY_TILE)
        scores = jnp.where(past[:, None], mass, -jnp.inf).reshape(*mass.shape[:2], -1)
        wanted = jnp.broadcast_to(jnp.floor(budget).astype(jnp.int32)[:, None], scores.shape[:2])
        chosen = select.top_k_mask(scores, wanted).reshape(mass.shape)
        blocks, count = compact(chosen, mass.shape[-1])
        return SparsePlan(blocks=blocks, block_count=count)


def tile_masses(q: Array, k: Array, *, lengths: Array, q_offset: Array, scale: float) -> Array:
    """Dense softmax mass of each key tile, summed over the rows of each query tile: float32 `[b, n, i, kt]`.

    Scores of one query tile exist at a time.
    """
    b, t, n, h = q.shape
    s, kv_heads, count = k.shape[1], k.shape[2], num_query_tiles(t)
    tiles = jnp.pad(q, ((0, 0), (0, count * QUERY_TILE - t), (0, 0), (0, 0)))
    tiles = tiles.reshape(b, count, QUERY_TILE, kv_heads, n // kv_heads, h).swapaxes(0, 1)
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def one(inputs: tuple[Array, Array]) -> Array:
        i, queries = inputs
        scores = jnp.einsum("bpkgh,bskh->bkgps", queries, k, precision=exact, preferred_element_type=jnp.float32)
        rows = q_offset + i * QUERY_TILE + jnp.arange(QUERY_TILE, dtype=jnp.int32)
        valid = (rows < lengths[:, None]) & (rows < q_offset + t)
        positions = jnp.where(valid, rows, -1)[:, None, None]
        weights = probe_weights(scores, scale, jnp.broadcast_to(positions, scores.shape[:-1])).sum(-2)
        weights = jnp.pad(weights, [(0, 0)] * 3 + [(0, -s % KEY_TILE)])
        return weights.reshape(b, n, -1, KEY_TILE).sum(-1)

    return jnp.moveaxis(jax.lax.map(one, (jnp.arange(count, dtype=jnp.int32), tiles)), 0, 2)


def _window_bands(window: int) -> np.ndarray:
    return KEY_TILE * np.arange(1, -(-max(window - 1, 0) // KEY_TILE) + 1, dtype=np.int32)


def _fixed(q: Array, k: Array, sink: int, bands: np.ndarray) -> SparsePlan:
    """The first `sink` keys and the given bands, for every head; what lies past the keys is left out."""
    columns = np.arange(min(sink, k.shape[1]), dtype=np.int32)
    bands = bands[bands < num_key_tiles(k.shape[1]) * KEY_TILE]

    def part(values: np.ndarray) -> tuple[Array | None, Array | None]:
        lead = (q.shape[0], q.shape[2])
        if not values.size:
            return None, None
        return jnp.broadcast_to(values, (*lead, values.size)), jnp.full(lead, values.size, jnp.int32)

    return SparsePlan(*part(columns), *part(bands))


def _question_tiles(q: Array, k: Array, question: int, lengths: Array, q_offset: Array) -> Bool[Array, "b 1 i kt"]:
    """All key tiles, for the query tiles that hold any of the last `question` tokens."""
    first = q_offset + QUERY_TILE * jnp.arange(num_query_tiles(q.shape[1]), dtype=jnp.int32)
    holds = (first + QUERY_TILE > lengths[:, None] - question) & (first < lengths[:, None]) & (question > 0)
    return jnp.broadcast_to(holds[:, None, :, None], (*holds.shape[:1], 1, holds.shape[1], num_key_tiles(k.shape[1])))


def _with_tiles(plan: SparsePlan, flags: Bool[Array, "b _ i kt"], heads: int) -> SparsePlan:
    blocks, count = compact(jnp.broadcast_to(flags, (flags.shape[0], heads, *flags.shape[2:])), flags.shape[-1])
    return dataclasses.replace(plan, blocks=blocks, block_count=count)
