"""How much of dense attention's softmax mass each rule captures on real text, at equal density.

Run as `python -m minference_jax.bench.recall MODEL_DIR TEXT_FILE [--tokens 4096]`. Queries and keys come from the
model's own dense run over the text; the share is exact, over all rows, layer by layer and head by head. The original's
rule is given so many slash lines that it visits as many cells as ours, at three splits between columns and lines; in
a text of about a thousand tokens or fewer its fewest lines (a window of 100) visit more.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minference_jax.index.build import make_plan
from minference_jax.index.recall import recall
from minference_jax.patterns import Pattern, PatternArrays, VerticalSlash
from minference_jax.search.candidates import arrays


class Row(NamedTuple):
    """One pattern's figures over all layers and heads: mean density, and each head's recall."""

    name: str
    density: float
    recall: np.ndarray

    def __str__(self) -> str:
        r = self.recall.reshape(-1)
        worst = ", ".join(f"{x:.2f}" for x in np.sort(r)[:3])
        return (
            f"{self.name:<30} density {self.density:.3f}  recall {r.mean():.4f}  heads >= 0.9: {np.mean(r >= 0.9):.0%}"
            f"  >= 0.95: {np.mean(r >= 0.95):.0%}  worst {worst}"
        )


def near_a_quarter(tokens: int) -> VerticalSlash:
    """Our rule, in proportion to what visits about a quarter of the causal cells of 4,096 tokens of text; half of 512,
    where the diagonal tiles alone are a quarter."""
    size = tokens / 4096
    return VerticalSlash(
        columns=round(200 * size), tiles=max(1, round(4 * size)), probes="spread", threshold=1.4e-4 / size
    )


def lines_as_dense(sample: Sequence[tuple[Array, Array]], columns: int, density: float) -> VerticalSlash:
    """The original's rule with so many columns, and as many lines as reach `density` on the sampled layers."""
    (t, heads), low = sample[0][0].shape[1:3], 100
    high = t
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        # As arrays whose widths are those of all lines, so that one program serves every step.
        dense_enough = mean_density(sample, arrays([VerticalSlash(columns, middle)] * heads, t)) >= density
        low, high = (low, middle) if dense_enough else (middle, high)
    return VerticalSlash(columns, high)


def mean_density(sample: Sequence[tuple[Array, Array]], pattern: Pattern | PatternArrays) -> float:
    """Visited share of the causal cells, over the heads of some layers' (q, k)."""
    density = [make_plan(q, k, pattern).density(q.shape[1], k.shape[1]).mean() for q, k in sample]
    return float(np.mean(density))


def measure(model: Any, tokens: Int[Array, "1 t"], patterns: Mapping[str, Pattern]) -> list[Row]:
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


def main() -> None:
    """Prints the table, and our rule against each split of the original's."""
    from minference_jax.models.capture import capture_qkv
    from minference_jax.models.llama import Llama
    from minference_jax.models.tokenizer import load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="checkpoint directory or GGUF file")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    ids = load_tokenizer(arguments.model).encode(arguments.text.read_text(encoding="utf-8"))
    if len(ids) < arguments.tokens:
        parser.error(f"{arguments.text} has {len(ids):,} tokens; --tokens {arguments.tokens:,} are wanted")
    ids = ids[: arguments.tokens]
    model, tokens = Llama.from_pretrained(arguments.model, dtype="float32"), jnp.asarray([ids], jnp.int32)
    sample = [(q, k) for layer, (q, k, _) in enumerate(capture_qkv(model, tokens)) if layer % 4 == 0]
    ours = near_a_quarter(len(ids))
    density = mean_density(sample, ours)
    lines = [lines_as_dense(sample, len(ids) // share, density) for share in (32, 8, 4)]
    del sample
    rows = measure(model, tokens, {f"lines ({p.columns}, {p.slashes})": p for p in lines} | {"threshold": ours})
    for row in rows:
        print(row)
    for row in rows[:-1]:
        gain = rows[-1].recall - row.recall
        more = np.mean(rows[-1].recall >= 0.9) - np.mean(row.recall >= 0.9)
        print(
            f"threshold against {row.name}: mean {100 * gain.mean():+.2f} points, heads >= 0.9 {100 * more:+.0f} "
            f"points, lower in {np.mean(gain < 0):.0%} of heads, by more than a point in {np.mean(gain < -0.01):.0%}"
        )


if __name__ == "__main__":
    main()
