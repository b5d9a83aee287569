"""Head patterns in files: this package's JSON, the original's (MInference's `*_best_pattern.json`), and presets.

Reading parses JSON and nothing else; every defect of a file ends in one ValueError that names the place. Writing
replaces a file at once or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minference_jax.patterns.a_shape import AShape
from minference_jax.patterns.base import Pattern
from minference_jax.patterns.heads import HeadPatterns
from minference_jax.patterns.registry import FAMILIES, official_families
from minference_jax.patterns.vertical_slash import VerticalSlash
from minference_jax.runs.files import strict_json

FORMAT, VERSION = "minference_jax.patterns", 3

MAX_FILE_BYTES = 64 * 2**20
"""Largest accepted file; the largest official one (80 layers of 64 heads) has 0.3 MB."""

MAX_LAYERS, MAX_HEADS, MAX_ALL_HEADS = 1024, 1024, 1 << 17
"""More than any model has: a small file must not ask for the memory of millions of heads."""

_FILE_NAMES = {"density": "layer_density"}  # of a field; in files "density" is a figure of a head
_FIGURES = {"score": "scores", "density": "densities", "recall": "recalls"}  # of a head → of HeadPatterns
_OFFICIAL_DEFAULT = (VerticalSlash.official_name, 1000, 6096, 1)

PRESETS: dict[str, Pattern | Path] = {
    "llama-3.1-8b": VerticalSlash(columns=512, slashes=2048),
    "paper-table-7": VerticalSlash(columns=500, slashes=1500),
    "streaming-llm": AShape(sink=1024, window=4096),
    "smollm2-135m-instruct": Path(__file__).parents[1] / "data" / "smollm2_135m_instruct.json",
}


def preset(name: str, layers: int, heads: int) -> HeadPatterns:
    """Patterns known by name, for a model of so many layers and query heads per layer.

    - `"llama-3.1-8b"`: 512 columns and 2,048 slashes in every head, the official setting of Llama-3.1-8B-Instruct.
    - `"paper-table-7"`: 500 columns and 1,500 slashes, the middle entry of MInference's search space (Table 7).
    - `"streaming-llm"`: 1,024 sinks and a window of 4,096, its A-shape entry.
    - `"smollm2-135m-instruct"`: one pattern for each head of that model, searched at 4,096 tokens for a quarter of the
      causal cells; the file in this package says how.

    Raises ValueError for another name, or where a preset of one model is wanted for a model of another shape.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(sorted(PRESETS))}")
    found = PRESETS[name]
    if isinstance(found, Path):
        return load_patterns(found, heads=heads, layers=layers)
    return HeadPatterns.uniform(found, layers, heads)


def load_patterns(path: str | Path, *, heads: int | None = None, layers: int | None = None) -> HeadPatterns:
    """Reads a pattern file, ours or the original's.

    **Arguments:** `path`: a JSON file. `heads`: query heads per layer; default: as many as the file names. In an
    official file a head that is not named has the original's default, ("vertical_and_slash", 1000, 6096).
    `layers`: how many there must be; default: any number.

    Official entries become `VerticalSlash(columns, slashes)`, `AShape(sink, window)` ("stream_llm") and
    `BlockSparse(100)` (the original ignores the numbers); their scores are kept in `HeadPatterns.scores`.

    **Raises:** OSError if the file cannot be read; ValueError, with file, layer and head, for anything else.
    """
    return _read(path, lambda content: _parse(content, heads, layers))


def load_about(path: str | Path) -> dict[str, Any]:
    """What a file of ours says about its search (model, date, samples, objective, …); empty for other files.

    Raises what `load_patterns` raises.
    """

    def about(content: Any) -> dict[str, Any]:
        _parse(content, None, None)
        return content.get("about", {}) if isinstance(content, dict) else {}

    return _read(path, about)


def save_patterns(
    patterns: HeadPatterns, path: str | Path, *, official: bool = False, about: dict[str, Any] | None = None
) -> None:
    """Writes patterns as JSON; `official=True` in the original's format, so that it can use them.

    `about`: what to remember of where they come from, of types that JSON has; not kept in the original's format.

    Raises ValueError for a plan builder, which no file can hold, and with `official=True` for a pattern that the
    original does not know: `Dense`, tile budgets, spread probes, coverage, a density, or block budgets other than 100.
    """
    text = json.dumps(_to_official(patterns), allow_nan=False) if official else _lines(_to_ours(patterns, about))
    write_atomically(path, text)


def write_atomically(path: str | Path, text: str) -> None:
    """Replaces a file in one step: whoever reads it, or interrupts this, finds the old content or the new one."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: str | Path, parse: Callable[[Any], Any]) -> Any:
    path = Path(path)
    with path.open("rb") as file:
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_FILE_BYTES} bytes, so no pattern file")
    try:
        return parse(strict_json(raw))
    except RecursionError:
        raise ValueError(f"{path}: not a pattern file: nested too deeply") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: not a pattern file: {error}") from None


def _parse(content: Any, heads: int | None, layers: int | None) -> HeadPatterns:
    official = isinstance(content, list)
    patterns = _from_official(content, heads) if official else _from_ours(content)
    if heads is not None and patterns.num_heads != heads:
        raise ValueError(f"the file has {patterns.num_heads} heads per layer; expected {heads}")
    if layers is not None and patterns.num_layers != layers:
        raise ValueError(f"the file has {patterns.num_layers} layers; expected {layers}")
    return patterns


def _to_ours(patterns: HeadPatterns, about: dict[str, Any] | None) -> dict[str, Any]:
    layers = []
    for i, layer in enumerate(patterns.layers):
        row = []
        for j, pattern in enumerate(layer):
            if FAMILIES.get(pattern.name) is not type(pattern):
                raise ValueError(f"layer {i}, head {j}: {pattern!r} is of no registered family, so no file can hold it")
            fields = {
                _FILE_NAMES.get(name, name): value
                for name, value in dataclasses.asdict(pattern).items()
                if value is not None
            }
            tables = {name: getattr(patterns, table) for name, table in _FIGURES.items()}
            figures = {name: table[i][j] for name, table in tables.items() if table is not None}
            row.append({"pattern": _file_name(pattern.name), **fields, **figures})
        layers.append(row)
    return {"format": FORMAT, "version": VERSION, **({"about": about} if about else {}), "layers": layers}


def _lines(content: dict[str, Any]) -> str:
    """JSON with one head a line, so that two files can be compared by eye."""
    layers = content.pop("layers")
    head = json.dumps(content, indent=1, allow_nan=False)[:-2]
    rows = [",\n  ".join(json.dumps(entry, allow_nan=False) for entry in layer) for layer in layers]
    return head + ',\n "layers": [\n [' + "],\n [".join(rows) + "]\n ]\n}\n"


def _from_ours(content: Any) -> HeadPatterns:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'expected a list (the official format) or an object with "format": "{FORMAT}"')
    version = content.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"version {version!r} is not known; this package reads versions up to {VERSION}")
    unknown = set(content) - {"format", "version", "layers", "scores" if version == 1 else "about"}
    if unknown:
        raise ValueError(f"unknown entries {sorted(unknown)}")
    if not isinstance(content.get("about", {}), dict):
        raise ValueError('"about" must be an object')
    entries = _table(content.get("layers"), "layers", lambda entry, where: _entry(entry, where, version))
    layers = tuple(tuple(pattern for pattern, _ in row) for row in entries)
    if version == 1:
        return HeadPatterns(layers, _table(content["scores"], "scores", _number) if "scores" in content else None)
    figures: dict[str, Any] = {}
    for name, table in _FIGURES.items():
        given = {name in found for row in entries for _, found in row}
        if len(given) > 1:
            raise ValueError(f'some heads have a "{name}" and some have none')
        if True in given:
            figures[table] = tuple(tuple(found[name] for _, found in row) for row in entries)
    return HeadPatterns(layers, **figures)


def _table(rows: Any, name: str, convert: Callable[[Any, str], Any]) -> tuple[tuple[Any, ...], ...]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise ValueError(f'"{name}" must be a list of layers, each a list of heads')
    _check_size(len(rows), max(map(len, rows)))
    return tuple(
        tuple(convert(entry, f"layer {i}, head {j}") for j, entry in enumerate(row)) for i, row in enumerate(rows)
    )


def _entry(entry: Any, where: str, version: int) -> tuple[Pattern, dict[str, float]]:
    """A head's pattern, and its figures (score, density, recall)."""
    if not isinstance(entry, dict) or not isinstance(entry.get("pattern"), str):
        raise ValueError(f'{where}: expected an object with "pattern", got {_short(entry)}')
    fields = dict(entry)
    name = fields.pop("pattern")
    known_names = {_file_name(known): family for known, family in FAMILIES.items()}
    if name not in known_names:
        raise ValueError(f"{where}: unknown pattern {_short(name)}; known are {', '.join(known_names)}")
    family = known_names[name]
    figures = {}
    for figure in _FIGURES if version > 1 else ():
        if figure in fields:
            figures[figure] = _number(fields.pop(figure), f"{where}: {figure}")
    for figure in ("density", "recall"):
        if not 0 <= figures.get(figure, 0) <= 1:
            raise ValueError(f"{where}: {figure} must be in [0, 1], got {figures[figure]}")
    # The file's name of a field is another where a figure has that name.
    fields = {
        next((own for own, other in _FILE_NAMES.items() if other == field), field): x for field, x in fields.items()
    }
    try:
        return family.from_fields(_known(family, fields, version), version), figures
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _known(family: type[Pattern], fields: dict[str, Any], version: int) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(family)} | family.former_fields(version)
    unknown = {_FILE_NAMES.get(name, name) for name in set(fields) - known}
    if unknown:
        raise ValueError(f"{_file_name(family.name)} has no {sorted(unknown)}")
    return fields


def _file_name(name: str) -> str:
    """A family's name in files: words joined by underscores, as in the original's."""
    return name.replace("-", "_")


def _to_official(patterns: HeadPatterns) -> list[dict[str, list[Any]]]:
    content = []
    for i, layer in enumerate(patterns.layers):
        row = {}
        for j, p in enumerate(layer):
            score = 1 if patterns.scores is None else patterns.scores[i][j]
            numbers = p.official()
            if numbers is None:
                raise ValueError(f"layer {i}, head {j}: {p} has no form in the official format")
            row[str(j)] = [p.official_name, *numbers, score]
        content.append(row)
    return content


def _from_official(content: list[Any], heads: int | None) -> HeadPatterns:
    if not content or not all(isinstance(layer, dict) for layer in content):
        raise ValueError("the official format is a list with an object of heads for each layer")
    named = [{_head_number(key, i): entry for key, entry in layer.items()} for i, layer in enumerate(content)]
    count = 1 + max((head for layer in named for head in layer), default=-1)
    if heads is None:
        heads = count
    elif count > heads:
        raise ValueError(f"the file names head {count - 1}; expected {heads} heads")
    if not heads:
        raise ValueError("no layer names a head")
    _check_size(len(named), heads)
    rows = [
        [_official_entry(layer.get(j, _OFFICIAL_DEFAULT), f"layer {i}, head {j}") for j in range(heads)]
        for i, layer in enumerate(named)
    ]
    return HeadPatterns(
        tuple(tuple(p for p, _ in row) for row in rows), tuple(tuple(s for _, s in row) for row in rows)
    )


def _official_entry(entry: Any, where: str) -> tuple[Pattern, float]:
    if not isinstance(entry, list | tuple) or len(entry) != 4:
        raise ValueError(f"{where}: expected [pattern, number, number, score], got {_short(entry)}")
    name, first, second, score = entry
    try:
        known = {family.official_name: family for family in official_families()}
        if name not in known:
            raise ValueError(f"unknown pattern {_short(name)}; known are {', '.join(map(str, known))}")
        pattern = known[name].from_official(first, second)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    return pattern, _number(score, f"{where}: the score")


def _head_number(key: str, layer: int) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 4 and str(int(key)) == key and int(key) < MAX_HEADS):
        raise ValueError(f'layer {layer}: head keys are the strings "0", "1", …; got {_short(key)}')
    return int(key)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {_short(value)}")
    return value


def _check_size(layers: int, heads: int) -> None:
    if layers > MAX_LAYERS or heads > MAX_HEADS or layers * heads > MAX_ALL_HEADS:
        raise ValueError(f"{layers} layers of {heads} heads are more than any model has")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
