"""Rows of a user's file: JSONL, CSV or plain text."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from minference_jax.runs.files import strict_json

Row = dict[str, Any]
"""Field name → value. A line of text has the field `text` alone."""

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".txt": "text"}
"""What a file is, by its name's end. Anything else is text."""


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a UTF-8 file, in order: an object or a string a line of JSONL, a record of CSV or TSV whose first
    line names the fields, or a line of text. Empty lines are no rows.

    Raises `ValueError` naming the file and the line where something is wrong, and where there is no row.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    kind = SUFFIXES.get(path.suffix.lower(), "text")
    if kind == "jsonl":
        rows = [_object(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    elif kind == "text":
        rows = [{"text": line} for line in text.splitlines() if line.strip()]
    else:
        rows = _records(path, text, "\t" if kind == "tsv" else ",")
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _object(path: Path, number: int, line: str) -> Row:
    try:
        value = strict_json(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number}: a row is an object or a string, got {type(value).__name__}")
    return value


def _records(path: Path, text: str, delimiter: str) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    names: list[str] = []
    try:
        for record in reader:
            if not record:
                continue
            if not names:
                names = [name.strip() for name in record]
                if len(set(names)) < len(names) or not all(names):
                    raise ValueError(f"{path}, line 1: fields must have names that differ, got {', '.join(record)}")
            elif len(record) != len(names):
                raise ValueError(f"{path}, line {reader.line_num}: {len(record)} fields, {len(names)} are named")
            else:
                rows.append(dict(zip(names, record, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return rows
