"""What one side of a comparison writes: a directory of .npy files, the same for PyTorch and for JAX.

Files rather than arrays in memory, because the two sides are different processes and because logits are large: 2,048
positions of a 49,152-word vocabulary are 400 MB. Readers map them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int, Int32

__all__ = ["Outputs", "write_inputs"]


def write_inputs(directory: Path, tokens: Int[np.ndarray, "b t"], lengths: Int[np.ndarray, " b"]) -> None:
    """Puts `tokens` [b, t] and `lengths` [b] where the side that fills `directory` looks for them."""
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / "tokens.npy", np.asarray(tokens, np.int32))
    np.save(directory / "lengths.npy", np.asarray(lengths, np.int32))


@dataclass(frozen=True)
class Outputs:
    """The results of running a model over `tokens`; entries at or past a row's length are zero.

    `hidden` [b, levels, p, d] holds the embedding, the output of each layer and the final norm, `logits` [b, p, vocab]
    the logits, both at the p positions asked for. The others cover all positions: `argmax`, `margin` (the best logit
    less the second best), `logsumexp`, and `next_logit`, the logit of the token that follows (its last valid entry
    means nothing). `greedy` [b, m] is the greedy continuation, and `seconds` has "load", "prefill" and "decode".
    """

    hidden: Float32[np.ndarray, "b levels p d"]
    logits: Float32[np.ndarray, "b p vocab"]
    argmax: Int32[np.ndarray, "b t"]
    margin: Float32[np.ndarray, "b t"]
    logsumexp: Float32[np.ndarray, "b t"]
    next_logit: Float32[np.ndarray, "b t"]
    greedy: Int32[np.ndarray, "b m"]
    seconds: dict[str, float]

    @classmethod
    def load(cls, directory: Path) -> "Outputs":
        """Maps the arrays of `directory`; an array that was not asked for is empty."""
        arrays = {}
        for name in cls.__dataclass_fields__:
            path = directory / f"{name}.npy"
            if name != "seconds":
                arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else np.zeros(0)
        return cls(**arrays, seconds=json.loads((directory / "result.json").read_text())["seconds"])
