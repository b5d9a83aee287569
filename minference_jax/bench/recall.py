"""How much of dense attention's softmax mass each budget captures on real text, and at what density.

Run as `python -m minference_jax.bench.recall MODEL_DIR TEXT_FILE [--tokens 4096]`. Queries and keys come from the
model's own dense run over the text; the share is exact, over all rows, layer by layer and head by head.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minference_jax.index.build import make_plan
from minference_jax.index.recall import recall
from minference_jax.patterns import Pattern, VerticalSlash


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


def patterns_near_a_quarter(tokens: int) -> dict[str, Pattern]:
    """Line and tile budgets that visit about a quarter of the causal cells of a prompt of this length."""
    size = tokens / 4096
    return {
        "lines, many columns": VerticalSlash(columns=round(512 * size), slashes=round(142 * size)),
        "lines, few columns": VerticalSlash(columns=round(128 * size), slashes=round(155 * size)),
        "tiles, last rows": VerticalSlash(columns=round(256 * size), tiles=round(8 * size)),
        "tiles, spread rows": VerticalSlash(columns=round(256 * size), tiles=round(8 * size), probes="spread"),
    }


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
    """Prints the table, and each row against the first."""
    from minference_jax.models.llama import Llama
    from minference_jax.models.tokenizer import load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="checkpoint directory or GGUF file")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    ids = load_tokenizer(arguments.model).encode(arguments.text.read_text(encoding="utf-8"))[: arguments.tokens]
    rows = measure(
        Llama.from_pretrained(arguments.model, dtype="float32"),
        jnp.asarray([ids], jnp.int32),
        patterns_near_a_quarter(len(ids)),
    )
    for row in rows:
        won = np.mean(row.recall >= rows[0].recall)
        print(f"{row}  mean {row.recall.mean() - rows[0].recall.mean():+.4f}, no worse in {won:.0%} of heads")


if __name__ == "__main__":
    main()
