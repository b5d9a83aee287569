"""What a search was asked to do, checked; and the same as JSON, for files and to recognise an interrupted search."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from minference_jax.patterns import Pattern
from minference_jax.search.candidates import check_candidates, default_candidates
from minference_jax.search.cost import CostKind, Target, check_target

LADDER = (1 / 4, 1 / 2, 3 / 4, 1.0, 3 / 2, 2.0, 3.0)
"""Multiples of the factor of equal cost that a head may be given when budgets go where they help most."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of `search_patterns`, which documents them. Raises ValueError or TypeError naming what is wrong."""

    target: Target = None
    candidates: tuple[Pattern, ...] = dataclasses.field(default_factory=default_candidates)
    cost: CostKind = "visited"
    objective: Literal["mean", "worst"] = "mean"
    budgets: Literal["per-head", "equal"] = "per-head"
    query_tiles: int = 16
    end_tiles: int = 0

    def __post_init__(self) -> None:
        check_target(self.target, self.cost)
        object.__setattr__(self, "candidates", check_candidates(self.candidates))
        for name, known in (("objective", ("mean", "worst")), ("budgets", ("per-head", "equal"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if type(self.query_tiles) is not int or self.query_tiles < 1:
            raise ValueError(f"query_tiles must be a positive int, got {self.query_tiles!r}")
        if type(self.end_tiles) is not int or self.end_tiles < 0:
            raise ValueError(f"end_tiles must be an int of at least 0, got {self.end_tiles!r}")

    @property
    def ladder(self) -> tuple[float, ...]:
        """The costs that every candidate is measured at, as multiples of the target's budgets."""
        return LADDER if self.budgets == "per-head" else (1.0,)

    def describe(self) -> dict[str, Any]:
        """All settings, of types that JSON has."""
        return {
            "target": self.target if isinstance(self.target, float | None) else repr(self.target),
            "cost": self.cost,
            "objective": self.objective,
            "budgets": self.budgets,
            "query_tiles": self.query_tiles,
            "end_tiles": self.end_tiles,
            "candidates": [repr(candidate) for candidate in self.candidates],
        }
