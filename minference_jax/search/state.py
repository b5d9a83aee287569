"""What a search has measured so far, in one file that is replaced after each layer: interrupted work is not lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minference_jax.patterns.files import write_atomically
from minference_jax.runs.files import naming
from minference_jax.search.cost import CostModel
from minference_jax.search.measure import LayerRecord

FORMAT, VERSION = "minference_jax.search", 1


class SearchState:
    """Measured layers of one search, on disk at `path` (None: in memory only).

    `identity` says which search this is: model, samples, settings. Raises ValueError where the file belongs to
    another one or is damaged.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]):
        self.path, self.identity = path, identity
        self.calibration: tuple[CostModel, float] | None = None
        self.layers: dict[int, LayerRecord] = {}
        if path is not None and path.exists():
            self._load(path)

    def set_calibration(self, model: CostModel, target: float) -> None:
        """Keeps how cost is counted, so that a resumed search counts the same."""
        self.calibration = model, target
        self._save()

    def add(self, layer: int, record: LayerRecord) -> None:
        """Keeps a layer."""
        self.layers[layer] = record
        self._save()

    def finish(self) -> None:
        """Removes the file: its search is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _save(self) -> None:
        if self.path is None:
            return
        calibration = None
        if self.calibration is not None:
            model, target = self.calibration
            calibration = {"fixed": model.fixed, "slope": model.slope, "target": target}
        content = {
            "format": FORMAT,
            "version": VERSION,
            "search": self.identity,
            "calibration": calibration,
            "layers": {str(layer): record.to_json() for layer, record in self.layers.items()},
        }
        with naming(self.path):
            write_atomically(self.path, json.dumps(content, allow_nan=False))

    def _load(self, path: Path) -> None:
        hint = f"delete {path} or name another output to start anew"
        try:
            content = json.loads(path.read_bytes())
            known = content["format"], content["version"], content["search"]
            calibration = content["calibration"]
            if calibration is not None:
                model = CostModel(tuple(calibration["fixed"]), tuple(calibration["slope"]))
                calibration = model, calibration["target"]
            layers = {int(layer): LayerRecord.from_json(record) for layer, record in content["layers"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is no state of a pattern search ({error}); {hint}") from None
        if known != (FORMAT, VERSION, json.loads(json.dumps(self.identity))):
            raise ValueError(f"{path} belongs to another search (other model, samples or settings); {hint}")
        self.calibration, self.layers = calibration, layers
