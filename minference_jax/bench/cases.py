"""What `bench kernels` times: a pattern with its budgets, written `name:budget=number,...`."""

from __future__ import annotations

import dataclasses

from minference_jax.bench.shapes import block_bench_plan, vertical_slash_bench_plan
from minference_jax.patterns import AShape, BlockSparse, Pattern, VerticalSlash
from pallas_kernels import SparsePlan, plan_builders

BUDGETS = {
    "vertical-slash": {"columns": 1024, "window": 2048, "clusters": 32},
    "a-shape": {"sink": 1024, "window": 4096},
    "block-sparse": {"blocks": 100},
}
"""Budgets of each pattern and their defaults. Vertical-slash: random columns, and slash lines at the distances
0 .. window-1 and in runs of 127."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A pattern and its budgets. Raises ValueError for names that are not in `BUDGETS` and numbers out of range."""

    pattern: str
    budgets: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.pattern not in BUDGETS:
            raise ValueError(f"unknown pattern {self.pattern!r}; there are {', '.join(BUDGETS)}")
        for name, value in self.budgets:
            if name not in BUDGETS[self.pattern]:
                raise ValueError(f"{self.pattern} has no budget {name!r}; it has {', '.join(BUDGETS[self.pattern])}")
            if value < 0:
                raise ValueError(f"{self.pattern}: {name} must not be negative; got {value}")

    @staticmethod
    def parse(text: str) -> Case:
        """A case from `a-shape:sink=128,window=512`. Raises ValueError for anything else."""
        pattern, _, rest = text.strip().partition(":")
        budgets = []
        for part in filter(None, rest.split(",")):
            name, _, number = part.partition("=")
            if not number.strip().isdecimal():
                raise ValueError(f"{text!r}: write budgets as name=number")
            budgets.append((name.strip(), int(number)))
        return Case(pattern, tuple(budgets))

    def __str__(self) -> str:
        return self.pattern + (":" + ",".join(f"{n}={v}" for n, v in self.budgets) if self.budgets else "")

    def values(self) -> dict[str, int]:
        """All budgets, defaults included."""
        return BUDGETS[self.pattern] | dict(self.budgets)

    def plan(self, batch: int, heads: int, length: int) -> SparsePlan:
        """The plan that is timed: the same budgets for all heads, random positions for each."""
        budgets = self.values()
        if self.pattern == "a-shape":
            return plan_builders.a_shape_plan(batch, heads, **budgets)
        if self.pattern == "vertical-slash":
            return vertical_slash_bench_plan(batch, heads, length, **budgets)
        return block_bench_plan(batch, heads, length, **budgets)

    def estimator(self) -> Pattern:
        """The pattern whose online index has these budgets."""
        budgets = self.values()
        if self.pattern == "a-shape":
            return AShape(**budgets)
        if self.pattern == "vertical-slash":
            return VerticalSlash(columns=budgets["columns"], slashes=budgets["window"] + 127 * budgets["clusters"])
        return BlockSparse(**budgets)
