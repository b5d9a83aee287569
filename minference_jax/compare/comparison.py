"""The differences between two runs over the same tokens, and whether they are within what is promised."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from minference_jax.compare.outputs import Outputs

__all__ = ["Comparison", "LayerDifference", "Tolerance", "compare_outputs"]

# Positions whose logits are in memory at a time: 256 positions of a 128K vocabulary are 128 MB in float32.
_CHUNK = 256


@dataclass(frozen=True)
class Tolerance:
    """Bounds a comparison has to keep; None leaves a quantity unbounded.

    - `logit_max`: largest |difference| of any logit.
    - `argmax`: smallest share of positions at which both put the same token first.
    - `greedy`: whether the greedy continuations have to be identical.
    - `perplexity`: largest relative difference of perplexity, in either direction.
    """

    logit_max: float | None = None
    argmax: float | None = None
    greedy: bool = False
    perplexity: float | None = None

    @classmethod
    def default(cls, dtype: str, *, sparse: bool = False) -> "Tolerance":
        """The bounds for a dtype.

        float32 differs by the order of summation alone. In 16 bits each side rounds in other places, so single logits
        and close calls between tokens differ, but perplexity must not. A sparse run is another computation: it is
        held to 5 % of perplexity.
        """
        if sparse:
            return cls(perplexity=0.05)
        if dtype == "float32":
            return cls(logit_max=2e-3, argmax=0.999, greedy=True, perplexity=1e-4)
        return cls(argmax=0.95, perplexity=0.02)


@dataclass(frozen=True)
class LayerDifference:
    """Max and RMS of how far the hidden states after one layer differ; `scale` is the RMS of PyTorch's."""

    name: str
    max: float
    rms: float
    scale: float


@dataclass(frozen=True)
class Comparison:
    """Ours against PyTorch's. Layers and logits are compared at `positions` positions, the rest at all `tokens`.

    - `layers`: embedding, each layer's output, final norm.
    - `logit_max`, `logit_rms`: of the difference; `logit_scale`: RMS of PyTorch's logits.
    - `kl`: mean Kullback-Leibler divergence of our next-token distribution from PyTorch's, nats.
    - `argmax_agreement`: share of positions with the same most likely token; `largest_lost_margin`: the most by which
      PyTorch preferred its token where ours differs (0 where none does).
    - `greedy_ours`, `greedy_torch`: continuations, one tuple of token ids for each row.
    - `perplexity_ours`, `perplexity_torch`: of the tokens themselves.
    - `seconds_ours`, `seconds_torch`: "load", "prefill" and "decode"; ours with compilation in "compile".
    """

    model: str
    dtype: str
    patterns: str | None
    tokens: int
    positions: int
    layers: tuple[LayerDifference, ...]
    logit_max: float
    logit_rms: float
    logit_scale: float
    kl: float
    argmax_agreement: float
    largest_lost_margin: float
    greedy_ours: tuple[tuple[int, ...], ...]
    greedy_torch: tuple[tuple[int, ...], ...]
    perplexity_ours: float
    perplexity_torch: float
    seconds_ours: dict[str, float]
    seconds_torch: dict[str, float]
    versions: dict[str, str]
    tolerance: Tolerance

    @property
    def greedy_agreement(self) -> float:
        """Share of each continuation up to its first difference, averaged over rows; 1 when none was asked for."""
        shares = []
        for ours, theirs in zip(self.greedy_ours, self.greedy_torch, strict=True):
            same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))
            shares.append(same / len(theirs))
        return sum(shares) / len(shares) if shares else 1.0

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for each bound of `tolerance` that is not kept. NaN keeps no bound."""
        bounds, lines = self.tolerance, []
        if bounds.logit_max is not None and not self.logit_max <= bounds.logit_max:
            lines.append(f"largest logit difference {self.logit_max:.3g} > {bounds.logit_max:.3g}")
        if bounds.argmax is not None and not self.argmax_agreement >= bounds.argmax:
            lines.append(f"same most likely token at {self.argmax_agreement:.3%} of positions < {bounds.argmax:.3%}")
        if bounds.greedy and self.greedy_agreement < 1:
            lines.append(f"greedy continuations agree for {self.greedy_agreement:.1%} of their length only")
        change = abs(self.perplexity_ours / self.perplexity_torch - 1)
        if bounds.perplexity is not None and not change <= bounds.perplexity:
            lines.append(f"perplexity differs by {change:.3%} > {bounds.perplexity:.3%}")
        return tuple(lines)

    @property
    def within_tolerance(self) -> bool:
        """Whether every bound of `tolerance` is kept."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """All fields and verdicts, of types that `json.dumps` writes."""
        verdicts = ("greedy_agreement", "failures", "within_tolerance")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in verdicts}


def compare_outputs(
    ours: Outputs,
    theirs: Outputs,
    *,
    tokens: Int[np.ndarray, "b t"],
    lengths: Int[np.ndarray, " b"],
    positions: Sequence[int],
    **about: Any,
) -> Comparison:
    """Reads both runs piece by piece; `about` gives the fields of Comparison that describe the runs."""
    rows = [(row, [i for i, p in enumerate(positions) if p < length]) for row, length in enumerate(lengths)]
    valid = np.arange(tokens.shape[1]) < lengths[:, None]
    # The last token of a row predicts nothing we know.
    predicts = np.arange(tokens.shape[1]) < lengths[:, None] - 1
    differs = valid & (ours.argmax != theirs.argmax)
    logits = _difference("logits", [(ours.logits[row], theirs.logits[row], kept) for row, kept in rows])
    return Comparison(
        tokens=int(valid.sum()),
        positions=sum(len(kept) for _, kept in rows),
        layers=_layer_differences(ours, theirs, rows),
        logit_max=logits.max,
        logit_rms=logits.rms,
        logit_scale=logits.scale,
        kl=_mean_kl(ours, theirs, rows, np.asarray(positions)),
        argmax_agreement=float(1 - differs.sum() / valid.sum()),
        largest_lost_margin=float(np.where(differs, theirs.margin, 0).max()),
        greedy_ours=_rows_of(ours.greedy),
        greedy_torch=_rows_of(theirs.greedy),
        perplexity_ours=_perplexity(ours, predicts),
        perplexity_torch=_perplexity(theirs, predicts),
        seconds_ours=ours.seconds,
        seconds_torch=theirs.seconds,
        **about,
    )


def _rows_of(greedy: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(token) for token in row) for row in greedy)


def _perplexity(outputs: Outputs, predicts: np.ndarray) -> float:
    losses = (outputs.logsumexp.astype(np.float64) - outputs.next_logit)[predicts]
    return math.exp(losses.mean()) if losses.size else math.nan


def _difference(name: str, pairs: Sequence[tuple[np.ndarray, np.ndarray, Sequence[int]]]) -> LayerDifference:
    """Max and RMS over the kept rows of pairs of [p, width] arrays."""
    largest, squares, scale, count = 0.0, 0.0, 0.0, 0
    for ours, theirs, kept in pairs:
        for start in range(0, len(kept), _CHUNK):
            chunk = kept[start : start + _CHUNK]
            expected = theirs[chunk]
            difference = ours[chunk] - expected
            # Not max(): Python's would drop a NaN.
            largest = float(np.maximum(largest, np.maximum(difference.max(), -difference.min())))
            squares += float(np.vdot(difference, difference))
            scale += float(np.vdot(expected, expected))
            count += expected.size
    count = max(count, 1)
    return LayerDifference(name, largest, math.sqrt(squares / count), math.sqrt(scale / count))


def _layer_differences(ours: Outputs, theirs: Outputs, rows: Sequence[tuple[int, list[int]]]):
    levels = theirs.hidden.shape[1] if theirs.hidden.ndim == 4 else 0
    names = ["embedding", *(f"layer {layer}" for layer in range(levels - 2)), "final norm"]
    return tuple(
        _difference(names[level], [(ours.hidden[row, level], theirs.hidden[row, level], kept) for row, kept in rows])
        for level in range(levels)
    )


def _mean_kl(ours: Outputs, theirs: Outputs, rows: Sequence[tuple[int, list[int]]], positions: np.ndarray) -> float:
    total, count = 0.0, 0
    for row, kept in rows:
        for start in range(0, len(kept), _CHUNK):
            chunk = kept[start : start + _CHUNK]
            expected, actual = (
                run.logits[row][chunk] - run.logsumexp[row][positions[chunk], None] for run in (theirs, ours)
            )
            np.subtract(expected, actual, out=actual)
            total += float(np.vdot(np.exp(expected, out=expected), actual))
            count += len(chunk)
    return max(total, 0.0) / max(count, 1)
