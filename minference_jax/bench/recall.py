"""How much of dense attention's softmax mass each rule captures on real text, at equal density: a table in Markdown.

Run as `python -m minference_jax.bench.recall MODEL TEXT... [--tokens 4096 8192]`. Queries and keys come from the
model's own dense run over the start of each text; the share is exact, over all rows, layer by layer and head by head.
Our rule gets the threshold that visits a quarter of the causal cells, the original's so many slash lines that it visits
as many cells as ours, at three splits between columns and lines; in a text of about a thousand tokens or fewer its
fewest lines (a window of 100) visit more. Both are set by density alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minference_jax.attention import make_plan
from minference_jax.index.recall import recall
from minference_jax.patterns import LayerPatterns, Pattern, PerTile, VerticalSlash, layer_patterns
from minference_jax.search.candidates import arrays


class Row(NamedTuple):
    """One pattern's figures over all layers and heads: mean density, and each head's recall."""

    name: str
    density: float
    recall: np.ndarray

    def __str__(self) -> str:
        r = self.recall.reshape(-1)
        worst = ", ".join(f"{x:.2f}" for x in np.sort(r)[:3])
        cells = (self.name, f"{self.density:.3f}", f"{r.mean():.4f}", f"{np.mean(r >= 0.9):.0%}")
        return " | ".join((*cells, f"{np.mean(r >= 0.95):.0%}", worst))

    def against(self, other: Row) -> str:
        """What this rule captures more than another: mean, share of heads >= 0.9, and the heads that lose."""
        gain = (self.recall - other.recall).reshape(-1)
        more = np.mean(self.recall >= 0.9) - np.mean(other.recall >= 0.9)
        lose = f"{np.mean(gain < 0):.0%} ({np.mean(gain < -0.01):.0%} by more than a point)"
        most = ", ".join(f"{100 * x:+.1f}" for x in np.sort(gain)[:3])
        return f"{100 * gain.mean():+.2f} | {100 * more:+.0f} | {lose} | {most}"


HEADER = (
    "| text | tokens | rule | density | mean recall | heads ≥ 0.9 | ≥ 0.95 | worst heads | ours: mean, points "
    "| heads ≥ 0.9 | ours is lower in | by at most |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def near_a_quarter(tokens: int) -> PerTile | VerticalSlash:
    """Our rule, in proportion to what visits about a quarter of the causal cells of text (where the diagonal tiles
    leave room for it: of 512 tokens, they alone are a quarter).

    Up to 16,384 tokens every eighth row is a probe, and no head keeps less than under the original's rule.
    """
    if tokens <= 1 << 14:
        return PerTile(8, 0.7 / tokens, floor_columns=tokens // 4, floor_slashes=round(tokens**0.8 / 7))
    size = tokens / 4096
    return VerticalSlash(columns=round(200 * size), tiles=round(4 * size), probes="spread", threshold=1.5e-4 / size)


def as_dense(
    layers: Sequence[tuple[Array, Array]], pattern: PerTile | VerticalSlash, density: float
) -> PerTile | VerticalSlash:
    """The pattern with the threshold, within a factor of 4, at which it visits `density` of the cells."""
    assert pattern.threshold is not None
    heads = layer_patterns(pattern, layers[0][0].shape[2])
    budgets: Any = heads.budgets[0]

    def visited(threshold: float) -> float:
        # A traced argument, so that one program serves every step.
        changed = dataclasses.replace(budgets, threshold=jnp.full_like(budgets.threshold, threshold))
        return mean_density(layers, dataclasses.replace(heads, budgets=(changed,)))

    found = _reach(visited, pattern.threshold / 4, min(pattern.threshold * 4, 0.5), density)
    return dataclasses.replace(pattern, threshold=found)


def lines_as_dense(layers: Sequence[tuple[Array, Array]], columns: int, density: float) -> VerticalSlash:
    """The original's rule with so many columns, and as many lines as visit `density` of the cells."""
    t, heads = layers[0][0].shape[1:3]

    def visited(lines: float) -> float:
        # As arrays whose widths are those of all lines, so that one program serves every step.
        return mean_density(layers, arrays([VerticalSlash(columns, round(lines))] * heads, t))

    return VerticalSlash(columns, round(_reach(visited, 100, t, density)))


def _reach(visited: Callable[[float], float], low: float, high: float, density: float) -> float:
    """Where between `low` and `high` a monotonic density is nearly the one wanted (to a thousandth, in few steps)."""
    x, y = [math.log(low), math.log(high)], [math.log(visited(end) / density) for end in (low, high)]
    if y[0] * y[1] >= 0:
        return math.exp(x[0] if abs(y[0]) < abs(y[1]) else x[1])
    for step in range(12):
        # Where a line through both ends crosses zero, or every other time half way: an end may be far off.
        share = 0.5 if step % 2 else min(max(y[0] / (y[0] - y[1]), 0.05), 0.95)
        x_new = x[0] + share * (x[1] - x[0])
        y_new = math.log(visited(math.exp(x_new)) / density)
        same = 0 if y_new * y[0] > 0 else 1
        x[same], y[same] = x_new, y_new
        if abs(y_new) * density < 0.001:
            break
    return math.exp(x[0] if abs(y[0]) < abs(y[1]) else x[1])


def mean_density(layers: Sequence[tuple[Array, Array]], pattern: Pattern | str | LayerPatterns) -> float:
    """Visited share of the causal cells, over the heads of some layers' (q, k)."""
    density = [make_plan(q, k, pattern).density(q.shape[1], k.shape[1]).mean() for q, k in layers]
    return float(np.mean(density))


def measure(model: Any, tokens: Int[Array, "1 t"], patterns: Mapping[str, Pattern | str]) -> list[Row]:
    """Density and exact recall of each pattern, on the queries and keys of a `Llama` over one prompt."""
    from minference_jax.models.capture import capture_qkv

    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in patterns}
    for q, k, _ in capture_qkv(model, tokens):
        for name, pattern in patterns.items():
            plan = make_plan(q, k, pattern)
            density = plan.density(q.shape[1], k.shape[1])
            found[name].append((np.asarray(density[0]), np.asarray(recall(q, k, plan)[0])))
    return [
        Row(name, float(np.mean([d for d, _ in layers])), np.stack([r for _, r in layers]))
        for name, layers in found.items()
    ]


def table(path: str, texts: Sequence[Path], lengths: Sequence[int], density: float = 0.25) -> None:
    """Prints the table: the original's rule at three splits and ours, for each text and length.

    **Arguments:** `path`: checkpoint directory or GGUF file.

    **Raises:** ValueError for a text with fewer tokens than wanted.
    """
    from minference_jax.models.capture import capture_qkv
    from minference_jax.models.llama import Llama
    from minference_jax.text.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(path), Llama.from_pretrained(path, dtype="float32")
    print(HEADER, flush=True)
    for length in lengths:
        for text in texts:
            ids = tokenizer.encode(text.read_text(encoding="utf-8"))[:length]
            if len(ids) < length:
                raise ValueError(f"{text} has {len(ids):,} tokens; {length:,} are wanted")
            tokens = jnp.asarray([ids], jnp.int32)
            layers = [(q, k) for q, k, _ in capture_qkv(model, tokens)]
            ours = as_dense(layers, near_a_quarter(length), density)
            visited = mean_density(layers, ours)
            lines = [lines_as_dense(layers, length // share, visited) for share in (32, 8, 4)]
            del layers
            patterns = {f"original ({p.columns}, {p.slashes})": p for p in lines}
            rows = measure(model, tokens, patterns | {f"ours, threshold {ours.threshold:.1e}": ours})
            for row in rows:
                compared = rows[-1].against(row) if row is not rows[-1] else " | | | "
                print(f"| {text.stem} | {length:,} | {row} | {compared} |", flush=True)


def main() -> None:
    """Prints the table of the given texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="checkpoint directory or GGUF file")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192])
    arguments = parser.parse_args()
    try:
        table(arguments.model, arguments.texts, arguments.tokens)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
