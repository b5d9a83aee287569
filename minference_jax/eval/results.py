"""Results of single samples in a JSONL file, appended as they come, and read again by a run that goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from minference_jax.eval.metrics import wilson


@dataclasses.dataclass(frozen=True)
class Result:
    """What one method made of one sample.

    - `score`: in [0, 1]; None for text whose likelihood is measured, of which `nll` is the mean over `tokens` tokens.
    - `density`, `recall`: mean over layers and heads; 1 for dense attention, None where not measured.
    """

    method: str
    task: str
    length: int
    index: int
    score: float | None = None
    reply: str = ""
    nll: float | None = None
    tokens: int = 0
    density: float | None = None
    recall: float | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What a result is of."""
        return self.method, self.task, self.length, self.index


class ResultFile:
    """A JSONL file whose first line says what run it belongs to, and whose others are results.

    A last line that was cut off, as a killed run may leave it, is dropped. Raises `ValueError` when the file is of a
    run with other settings, naming them, or no such file.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path, self.results = Path(path), []
        settings = dict(json.loads(json.dumps(settings)))
        found = self.path.read_bytes() if self.path.exists() else b""
        whole = found[: found.rfind(b"\n") + 1]
        if whole:
            try:
                first, *lines = (json.loads(line) for line in whole.splitlines())
                self.results = [Result(**line) for line in lines]
                before = dict(first["settings"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no file of results: {type(error).__name__} {error}") from None
            if before != settings:
                names = sorted(name for name in {**before, **settings} if before.get(name) != settings.get(name))
                wrong = ", ".join(f"{name} {before.get(name)!r} instead of {settings.get(name)!r}" for name in names)
                raise ValueError(f"{path} is of another run: {wrong}; name another file, or delete it")
            os.truncate(self.path, len(whole))  # never without what it holds, whenever this run is killed
        elif found and not found.startswith(b'{"settings"'[: len(found)]):
            raise ValueError(f"{path} is no file of results: it has no whole line")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")

    def append(self, results: Iterable[Result]) -> None:
        """Adds results, at once on disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            write_lines(file, results)
        self.results.extend(results)


def write_lines(file: TextIO, results: Iterable[Result]) -> None:
    """Results as JSON, one a line."""
    for result in results:
        file.write(json.dumps(dataclasses.asdict(result), ensure_ascii=False) + "\n")
    file.flush()


@dataclasses.dataclass(frozen=True)
class Cell:
    """All samples of one task (or of several) at one length by one method.

    `value`: mean score in percent with Wilson's 95 % interval `low` … `high`; of text, perplexity, with the interval
    that the spread of its windows' log-likelihoods gives. `density`: mean of what was measured.
    """

    value: float
    low: float
    high: float
    count: int
    density: float | None


def score_cell(results: list[Result]) -> Cell | None:
    """The cell of results with scores; None if there are none."""
    scores = [result.score for result in results if result.score is not None]
    if not scores:
        return None
    mean = sum(scores) / len(scores)
    low, high = wilson(mean, len(scores))
    return Cell(100 * mean, 100 * low, 100 * high, len(scores), mean_density(results))


def perplexity_cell(results: list[Result]) -> Cell | None:
    """The cell of results with likelihoods, exp of the mean over all tokens; None if there are none."""
    values = [(result.nll, result.tokens) for result in results if result.nll is not None]
    if not values:
        return None
    total = sum(tokens for _, tokens in values)
    mean = sum(nll * tokens for nll, tokens in values) / total
    spread = math.sqrt(sum((nll - mean) ** 2 for nll, _ in values) / max(len(values) - 1, 1) / len(values))
    low, high = (math.exp(mean + sign * 1.96 * spread) for sign in (-1, 1))
    return Cell(math.exp(mean), low, high, len(values), mean_density(results))


def mean_density(results: list[Result]) -> float | None:
    """Mean of the densities that were measured."""
    known = [result.density for result in results if result.density is not None]
    return sum(known) / len(known) if known else None
