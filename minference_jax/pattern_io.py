"""Head patterns in files: this package's JSON, and the original's (MInference's `*_best_pattern.json`).

Reading parses JSON and nothing else; every defect of a file ends in one ValueError that names the place.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minference_jax.patterns import AShape, BlockSparse, Dense, HeadPatterns, Pattern, VerticalSlash

FORMAT, VERSION = "minference_jax.patterns", 1

MAX_FILE_BYTES = 64 * 2**20
"""Largest accepted file; the largest official one (80 layers of 64 heads) has 0.3 MB."""

MAX_HEADS = 4096

_NAMES: dict[str, type] = {
    "dense": Dense,
    "a_shape": AShape,
    "vertical_slash": VerticalSlash,
    "block_sparse": BlockSparse,
}
_OFFICIAL_DEFAULT = ("vertical_and_slash", 1000, 6096, 1)
_OFFICIAL_BLOCKS = 100  # hard-coded in the original, whatever its files say

PRESETS: dict[str, Pattern] = {
    "llama-3.1-8b": VerticalSlash(columns=512, slashes=2048),
    "paper-table-7": VerticalSlash(columns=500, slashes=1500),
    "streaming-llm": AShape(sink=1024, window=4096),
}


def preset(name: str, layers: int, heads: int) -> HeadPatterns:
    """Patterns known by name, the same for every head.

    - `"llama-3.1-8b"`: 512 columns and 2,048 slashes, the official setting of Llama-3.1-8B-Instruct.
    - `"paper-table-7"`: 500 columns and 1,500 slashes, the middle entry of MInference's search space (Table 7).
    - `"streaming-llm"`: 1,024 sinks and a window of 4,096, its A-shape entry.

    Raises ValueError for another name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(sorted(PRESETS))}")
    return HeadPatterns.uniform(PRESETS[name], layers, heads)


def load_patterns(path: str | Path, *, heads: int | None = None) -> HeadPatterns:
    """Reads a pattern file, ours or the original's.

    **Arguments:** `path`: a JSON file. `heads`: query heads per layer; default: as many as the file names. In an
    official file a head that is not named has the original's default, ("vertical_and_slash", 1000, 6096).

    Official entries become `VerticalSlash(columns, slashes)`, `AShape(sink, window)` ("stream_llm") and
    `BlockSparse(100)` (the original ignores the numbers); their scores are kept in `HeadPatterns.scores`.

    **Raises:** OSError if the file cannot be read; ValueError, with file, layer and head, for anything else.
    """
    path = Path(path)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_FILE_BYTES} bytes, so no pattern file")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        return _from_official(content, heads) if isinstance(content, list) else _from_ours(content, heads)
    except RecursionError:
        raise ValueError(f"{path}: not a pattern file: nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a pattern file: {error}") from None


def save_patterns(patterns: HeadPatterns, path: str | Path, *, official: bool = False) -> None:
    """Writes patterns as JSON; `official=True` in the original's format, so that it can use them.

    Raises ValueError with `official=True` for a pattern that the original does not know: `Dense`, tile budgets,
    spread probes, coverage, or block budgets other than 100.
    """
    content = _to_official(patterns) if official else _to_ours(patterns)
    Path(path).write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def _to_ours(patterns: HeadPatterns) -> dict[str, Any]:
    names = {kind: name for name, kind in _NAMES.items()}
    layers = [[{"pattern": names[type(p)], **dataclasses.asdict(p)} for p in layer] for layer in patterns.layers]
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "layers": layers}
    if patterns.scores is not None:
        content["scores"] = [list(layer) for layer in patterns.scores]
    return content


def _from_ours(content: Any, heads: int | None) -> HeadPatterns:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'expected a list (the official format) or an object with "format": "{FORMAT}"')
    if content.get("version") != VERSION:
        raise ValueError(f"version {content.get('version')!r} is not known; this package reads version {VERSION}")
    unknown = set(content) - {"format", "version", "layers", "scores"}
    if unknown:
        raise ValueError(f"unknown entries {sorted(unknown)}")
    layers = _table(content.get("layers"), "layers", _pattern)
    scores = None if "scores" not in content else _table(content["scores"], "scores", _score)
    _check_heads(len(layers[0]), heads)
    return HeadPatterns(layers, scores)


def _table(rows: Any, name: str, convert: Callable[[Any, str], Any]) -> tuple[tuple[Any, ...], ...]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise ValueError(f'"{name}" must be a list of layers, each a list of heads')
    return tuple(
        tuple(convert(entry, f"layer {i}, head {j}") for j, entry in enumerate(row)) for i, row in enumerate(rows)
    )


def _pattern(entry: Any, where: str) -> Pattern:
    if not isinstance(entry, dict) or not isinstance(entry.get("pattern"), str):
        raise ValueError(f'{where}: expected an object with "pattern", got {_short(entry)}')
    fields = dict(entry)
    name = fields.pop("pattern")
    if name not in _NAMES:
        raise ValueError(f"{where}: unknown pattern {_short(name)}; known are {', '.join(_NAMES)}")
    unknown = set(fields) - {field.name for field in dataclasses.fields(_NAMES[name])}
    if unknown:
        raise ValueError(f"{where}: {name} has no {sorted(unknown)}")
    try:
        return _NAMES[name](**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _to_official(patterns: HeadPatterns) -> list[dict[str, list[Any]]]:
    content = []
    for i, layer in enumerate(patterns.layers):
        row = {}
        for j, p in enumerate(layer):
            score = 1 if patterns.scores is None else patterns.scores[i][j]
            if isinstance(p, VerticalSlash) and (p.tiles, p.probes, p.coverage) == (None, "last", None):
                row[str(j)] = ["vertical_and_slash", p.columns, p.slashes, score]
            elif isinstance(p, AShape):
                row[str(j)] = ["stream_llm", p.sink, p.window, score]
            elif isinstance(p, BlockSparse) and p.blocks == _OFFICIAL_BLOCKS:
                row[str(j)] = ["block_sparse", p.blocks, 0, score]
            else:
                raise ValueError(f"layer {i}, head {j}: {p} has no form in the official format")
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
        if name == "vertical_and_slash":
            pattern: Pattern = VerticalSlash(columns=first, slashes=second)
        elif name == "stream_llm":
            pattern = AShape(sink=first, window=second)
        elif name == "block_sparse":
            pattern = BlockSparse(_OFFICIAL_BLOCKS)
        else:
            raise ValueError(f"unknown pattern {_short(name)}; known are vertical_and_slash, stream_llm, block_sparse")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    return pattern, _score(score, where)


def _head_number(key: str, layer: int) -> int:
    if not (key.isascii() and key.isdigit() and str(int(key)) == key and int(key) < MAX_HEADS):
        raise ValueError(f'layer {layer}: head keys are the strings "0", "1", …; got {_short(key)}')
    return int(key)


def _score(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: the score must be a finite number, got {_short(value)}")
    return value


def _check_heads(found: int, heads: int | None) -> None:
    if heads is not None and found != heads:
        raise ValueError(f"the file has {found} heads per layer; expected {heads}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {_short(key)} occurs twice in one object")
        out[key] = value
    return out


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that patterns can hold")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
