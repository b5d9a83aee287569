"""Results of single samples in a JSONL file, appended as they come, and read again by a run that goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from minference_jax.eval.metrics import wilson
from minference_jax.runs.files import differences, naming


@dataclasses.dataclass(frozen=True)
class Result:
    """What one method made of one sample.

    - `score`: in [0, 1]; None for text whose likelihood is measured, of which `nll` is the mean over `tokens` tokens.
    - `density`, `recall`: mean over layers and heads; 1 for dense attention, None where not measured.
    - `answers`: those that were right. `seconds`: its share of its batch's time, compilation included; two runs with
      the same results differ in it.
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
    answers: tuple[str, ...] = ()
    seconds: float | None = dataclasses.field(default=None, compare=False)

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What a result is of."""
        return self.method, self.task, self.length, self.index

    @classmethod
    def from_json(cls, fields: Any) -> Result:
        """Of what `dataclasses.asdict` gave. Raises `ValueError` or `TypeError` naming a field that is wrong."""
        if not isinstance(fields, dict):
            raise TypeError(f"a result is a JSON object, got {fields!r}")
        given: dict[str, Any] = fields | {"answers": tuple(map(str, fields.get("answers", ())))}
        result = cls(**given)
        for name, kind in (("method", str), ("task", str), ("reply", str), ("about", dict)):
            if not isinstance(getattr(result, name), kind):
                raise ValueError(f"{name} is {getattr(result, name)!r}")
        for name in ("length", "index", "tokens"):
            value = getattr(result, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is {value!r}, no whole number from 0 on")
        for name in ("score", "nll", "density", "recall", "seconds"):
            value = getattr(result, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{name} is {value!r}, no number")
        if result.score is not None and not 0 <= result.score <= 1:
            raise ValueError(f"score is {result.score!r}, not between 0 and 1")
        if result.nll is not None and not result.tokens:
            raise ValueError("nll of 0 tokens")
        return result


@dataclasses.dataclass(frozen=True)
class Run:
    """A file of results: the `settings`, which decide them, what else was said `about` the run, and its results."""

    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    results: Sequence[Result]


class Results:
    """Results in memory, each of another sample: one of a sample that has a result already is left out."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self._keys: set[tuple[str, str, int, int]] = set()

    def __contains__(self, key: tuple[str, str, int, int]) -> bool:
        """Whether there is a result of this `Result.key`."""
        return key in self._keys

    def append(self, results: Iterable[Result]) -> None:
        """Adds results."""
        self._keep(self._new(results))

    def _new(self, results: Iterable[Result]) -> list[Result]:
        """Those of samples that have no result yet, one of each."""
        first = {}
        for result in results:
            if result.key not in self._keys:
                first.setdefault(result.key, result)
        return list(first.values())

    def _keep(self, results: Sequence[Result]) -> None:
        self.results.extend(results)
        self._keys.update(result.key for result in results)


class ResultFile(Results):
    """A JSONL file whose first line says what made it, and whose others are results, each of another sample.

    What is there already is read into `results`, where a result of a sample that has one is left out. A last line that
    was cut off, as a killed run may leave it, is dropped. A run that writes must hold the file's lock (`runs.lock`).

    Raises `ValueError` when the file was made by something else, naming what differs, or is no such file, naming the
    line. `about` is written for people, and compared with nothing.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], about: Mapping[str, Any] | None = None):
        super().__init__()
        self.path = Path(path)
        settings = dict(json.loads(json.dumps(settings)))
        found = self.path.read_bytes() if self.path.exists() else b""
        whole = found[: found.rfind(b"\n") + 1]
        if whole:
            self._read(whole.split(b"\n"), settings)
            os.truncate(self.path, len(whole))  # never without what it holds, whenever this run is killed
        elif found and not found.startswith(b'{"settings"'[: len(found)]):
            raise ValueError(f"{path} is no file of results: it has no whole line")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            first = {"settings": settings} | ({"about": dict(about)} if about else {})
            with naming(path):
                self.path.write_text(json.dumps(first) + "\n", encoding="utf-8")

    def append(self, results: Iterable[Result]) -> None:
        """Adds results, at once on disk, except of samples that have one. Where the disk is full, it adds none."""
        new = self._new(results)
        size = self.path.stat().st_size
        try:
            with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                write_lines(file, new)
        except OSError:
            os.truncate(self.path, size)
            raise
        self._keep(new)

    def _read(self, lines: Sequence[bytes], settings: Mapping[str, Any]) -> None:
        found = _parse(self.path, lines)
        if wrong := differences(found.settings, settings):
            raise _of_another_run(self.path, wrong)
        self._keep(self._new(found.results))


def read_results(path: str | Path) -> Run:
    """What a file of results holds, of a run that is done or goes on; a last line that was cut off is left out.

    Raises `ValueError` naming the file and the line where it is no such file.
    """
    found = Path(path).read_bytes()
    lines = found[: found.rfind(b"\n") + 1].split(b"\n")
    if not lines[0].strip():
        raise ValueError(f"{path} is no file of results: it has no whole line")
    run, kept = _parse(path, lines), Results()
    kept.append(run.results)
    return dataclasses.replace(run, results=kept.results)


def _parse(path: str | Path, lines: Sequence[bytes]) -> Run:
    results, settings, about = [], {}, {}
    for number, line in enumerate(lines, 1):
        try:
            if not line.strip():
                continue
            content = json.loads(line)
            if number == 1:
                settings, about = dict(content["settings"]), dict(content.get("about", {}))
            elif "settings" in content:  # of a file that was appended to this one
                if content["settings"] != settings:
                    raise ValueError("a run with other settings begins here")
            else:
                results.append(Result.from_json(content))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"line {number}: {type(error).__name__} {error}"
            raise ValueError(f"{path} is no file of results: {what}") from None
    return Run(settings, about, results)


def check_result_file(path: str | Path, known: Mapping[str, Any]) -> None:
    """Raises `ValueError` where a file of results is there that does not agree with what is `known` of the settings."""
    try:
        before = read_run(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # there is none, or `ResultFile` says what is wrong with it
    if wrong := differences({name: before.get(name) for name in known}, json.loads(json.dumps(known))):
        raise _of_another_run(path, wrong)


def _of_another_run(path: str | Path, wrong: str) -> ValueError:
    return ValueError(f"{path} is of another run: {wrong}; name another file, or delete it")


def read_run(path: str | Path) -> dict[str, Any]:
    """What made a file of results: its `settings`, which decide them, and what else was said about it, in one."""
    with open(path, encoding="utf-8") as file:
        first = json.loads(file.readline())
    return {**first["settings"], **first.get("about", {})}


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


UNLIKE = 1.1
"""The ratio of two densities from which on their methods are not compared at the same cost."""


def unlike_densities(results: Iterable[Result]) -> list[str]:
    """A line for each length at which the sparse methods visited shares that are too unlike to compare their answers.

    Dense attention is no sparse method, and neither is one whose density was not measured.
    """
    found = []
    by_length: dict[int, dict[str, list[Result]]] = {}
    for result in results:
        by_length.setdefault(result.length, {}).setdefault(result.method, []).append(result)
    for length, methods in by_length.items():
        means = {method: mean_density(own) for method, own in methods.items()}
        sparse = {method: mean for method, mean in means.items() if mean is not None and mean < 1}
        if sparse and max(sparse.values()) > UNLIKE * min(sparse.values()):
            listed = ", ".join(f"{method} {mean:.3f}" for method, mean in sparse.items())
            found.append(
                f"At {length:,} tokens the densities differ by more than a tenth, so do not compare: {listed}."
            )
    return found
