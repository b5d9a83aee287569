"""The file of a job: a JSON object a row, kept at once, and what made them beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minference_jax.runs.files import check_output_file, differences, naming


class JobFile:
    """A JSONL file of objects with a `row` each, each row once, and `<name>.run.json`, which says what made them.

    What is there already is read into `rows`; a last line that was cut off is dropped. A job that writes must hold the
    file's lock (`runs.lock`).

    Raises `ValueError` where the file was made by something else, naming what differs, or is no such file, naming the
    line.
    """

    def __init__(self, path: str | Path, made_by: Mapping[str, Any]):
        check_job_file(path)
        self.path = Path(path)
        self.rows: dict[int, dict[str, Any]] = {}
        beside = _beside(self.path)
        settings = json.loads(json.dumps(made_by))
        found = self.path.read_bytes() if self.path.exists() else b""
        if not beside.exists():
            _replace(beside, json.dumps(settings) + "\n")
        else:
            _compare(self.path, _settings(beside), settings)
        whole = found[: found.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                value = json.loads(line)
                self.rows.setdefault(int(value["row"]), value)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{self.path}, line {number}: {type(error).__name__} {error}") from None
        if len(whole) < len(found):
            os.truncate(self.path, len(whole))

    def append(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Adds objects of rows that have none yet, on disk when this returns. Where the disk is full, it adds none."""
        new = [dict(value) for value in values if value["row"] not in self.rows]
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(map(_line, new)))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if self.path.exists():
                os.truncate(self.path, size)
            raise
        self.rows |= {value["row"]: value for value in new}

    def finish(self) -> None:
        """Brings the lines into the order of the rows. Killed in between, the file is as it was."""
        _replace(self.path, "".join(_line(self.rows[row]) for row in sorted(self.rows)))


def check_job_file(path: str | Path, known: Mapping[str, Any] | None = None) -> None:
    """Raises `ValueError` unless `path` can be written and holds nothing, or says beside it what made it, which must
    agree with what is `known` of the settings."""
    path = Path(path)
    check_output_file(path)
    if path.exists() and path.stat().st_size and not _beside(path).exists():
        raise ValueError(f"{path} exists, and {_beside(path).name} that says what made it does not: name another")
    if known and (before := job_settings(path)):
        _compare(path, {name: before.get(name) for name in known}, json.loads(json.dumps(known)))


def job_settings(path: str | Path) -> dict[str, Any]:
    """What made the job of which `path` is the file; empty where none was begun. Raises `ValueError` where that cannot
    be read."""
    beside = _beside(Path(path))
    return _settings(beside) if beside.exists() else {}


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".run.json")


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _replace(path: Path, text: str) -> None:
    other = path.with_name(path.name + ".new")
    with naming(other):
        other.write_text(text, encoding="utf-8")
        os.replace(other, path)


def _settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not say what made a job: {error}") from None


def _compare(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if wrong := differences(before, now):
        raise ValueError(f"{path} is of another job: {wrong}; name another file, or delete it and its .run.json")
