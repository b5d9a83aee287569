"""What every family of patterns is made of: the configuration, its budgets as arrays, and plan builders.

A family is one file. Its `Pattern` subclass is the configuration of one head, and says what the rest of the package
needs to know of it. Its `Budgets` subclass holds the numbers of all heads of a model as arrays, and runs the index.

    Pattern        one head        frozen, hashable: VerticalSlash(columns=64, tiles=16)
       | budgets()
    Budgets        all heads       arrays [layers, heads] and static widths; a pytree, scanned over layers
       | index(q, k, where)
    SparsePlan     one layer       what a kernel visits
"""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.plan import SparsePlan

MAX_BUDGET = 1 << 24
"""Largest accepted budget: longer than any prompt, so a larger number is a mistake."""

Colour = tuple[float, float, float]
"""Red, green and blue, each in [0, 1]."""


class IndexRates(Protocol):
    """What a pattern asks of a device to say what its index costs; see `minference_jax.patterns.rates.Rates`."""

    @property
    def probe(self) -> float:
        """Visited cells that take as long as one score of a probe row that is stored and read again."""
        ...

    @property
    def mass(self) -> float:
        """Visited cells that take as long as one score of a probe row in `pallas_kernels.tile_masses`."""
        ...

    @property
    def index(self) -> float:
        """Seconds of an index of no keys."""
        ...

    @property
    def index_key(self) -> float:
        """Seconds of an index for each key, of 32 query heads."""
        ...

    @property
    def selection(self) -> float:
        """Seconds of choosing tiles by their masses, beside the masses."""
        ...


@partial(
    jax.tree_util.register_dataclass, data_fields=["lengths", "q_offset", "unspent"], meta_fields=["scale", "axis_name"]
)
@dataclasses.dataclass(frozen=True)
class Where:
    """Which rows and keys an index is for.

    - `lengths`: int32 `[b]` in [0, s], keys of each sequence (right padding).
    - `q_offset`: int32 scalar, position of the first query row, a multiple of 128.
    - `scale` (static): of the scores.
    - `axis_name` (static): the mesh axis over which the heads of a layer are divided, inside `jax.shard_map`; None
      where one device has them all. For what the heads of a layer share.
    - `unspent`: float32 `[b]`, see `LayerPatterns`; None where nothing is left over.
    """

    lengths: Int[Array, " b"]
    q_offset: Int[Array, ""]
    scale: float
    axis_name: str | None = None
    unspent: Float[Array, " b"] | None = None

    def keywords(self) -> dict[str, Any]:
        """What every function of `index/` that scores queries takes by name."""
        return {"lengths": self.lengths, "q_offset": self.q_offset, "scale": self.scale}


class Budgets(abc.ABC):
    """The budgets of one family for all heads of a model: a frozen dataclass, registered as a pytree.

    - Array leaves have shape `[layers, heads]`. A scan over layers passes `[heads]` to `index`. A head of another
      family has some number there, which is not used.
    - Static fields are widths: upper bounds of the budgets. They decide the shapes of a plan, so that one compiled
      program serves all layers and prompts.
    """

    @abc.abstractmethod
    def index(self, q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], where: Where) -> SparsePlan:
        """The plan of one layer as if all its heads were of this family. The leaves of `self` are `[heads]`.

        **Arguments:** `q`: `[b, t, n, h]`; `k`: `[b, s, k, h]`, the same dtype. `where`: lengths, offset, scale.

        **Returns:** a `SparsePlan`; parts that the family does not use are None.
        """

    def shares(self) -> Float[Array, "*layers n"] | None:
        """Of each head of a layer the density that it may leave unspent to later layers, inf for heads of others.

        None for a family that leaves nothing.
        """
        return None

    def for_part(self, share: Float[Array, "b 1"]) -> Self:
        """Budgets for a part of a prompt, which needs this share of them. Leaves become `[b, heads]`.

        By default they stay as they are.
        """
        return self

    def widest(self, keys: int) -> Self:
        """The same with static widths that hold any budget for `keys` keys, so that a search compiles once."""
        return self


@dataclasses.dataclass(frozen=True)
class Pattern(abc.ABC):
    """Which keys a head visits: a frozen, hashable dataclass whose fields are the configuration.

    The methods are what the rest of the package asks of a family; most have a default. A *cell* is one (query, key)
    pair.
    """

    name: ClassVar[str]
    """In files, on the command line and in pictures; words joined by hyphens."""

    indexed: ClassVar[bool] = True
    """Whether the pattern looks at the prompt: a fixed mask does not."""

    dense: ClassVar[bool] = False
    """Whether the pattern is attention to every earlier key."""

    copies_keys: ClassVar[bool] = False
    """Whether its index may hold all keys once more, in FP8."""

    official_name: ClassVar[str | None] = None
    """What MInference's own pattern files call it, if they know it."""

    @classmethod
    @abc.abstractmethod
    def budgets(cls, heads: Sequence[Sequence[Any]]) -> Budgets:
        """The budgets of all heads of a model that follow this family, as arrays.

        **Arguments:** `heads`: `heads[layer][head]` is a pattern of this family, or None for a head of another one.

        **Raises:** ValueError where the heads of a model have to agree on something and do not.
        """

    @abc.abstractmethod
    def visited(self, rows: int, keys: int, rates: IndexRates) -> float:
        """An estimate of what one head costs, in cells, for `auto` and for predicted times.

        It counts the cells that the kernel visits for the last `rows` of `keys` positions, and adds the index at the
        `rates` of the device: how many visited cells take as long. What overlaps depends on the prompt, so it is an
        estimate.
        """

    def index_seconds(self, keys: int, heads: int, rates: IndexRates) -> float:
        """Seconds that the index of one layer with `heads` query heads takes, beside what `visited` counts."""
        return rates.index + rates.index_key * keys * heads / 32 if self.indexed else 0.0

    def covers(self) -> int:
        """Up to so many keys the pattern visits every causal cell, and is served as dense attention."""
        return 0

    def index_bytes(self, rows: int, keys: int, heads: int, itemsize: int = 2) -> int:
        """The most device memory, in bytes, that index and kernel tables of one layer hold, if all `heads` follow the
        pattern.

        `itemsize`: bytes of one number of q and k.
        """
        return 0

    def scaled(self, factor: float, keys: int) -> Self:
        """The pattern with all budgets times `factor`, within what a prompt of `keys` tokens can hold.

        **Raises:** TypeError for a pattern without budgets.
        """
        raise TypeError(f"{self!r} has no budgets to scale")

    def check_candidate(self) -> None:
        """Raises ValueError or TypeError where a pattern search can't change this pattern's cost by `scaled`."""
        return

    @classmethod
    def candidates(cls) -> tuple[Pattern, ...]:
        """What a pattern search tries of this family beside the paper's candidates."""
        return ()

    def budget(self) -> float:
        """Keys that a row far into a prompt visits, about; infinity for all. Pictures shade heads by it."""
        return float("inf")

    def share(self) -> float | None:
        """The share of causal cells that the pattern asks for, where it is given as one. Pictures shade heads by it."""
        return None

    def with_share(self, share: float) -> Self:
        """The pattern with another share; only for those that have one."""
        raise TypeError(f"{self!r} asks for no share of the cells")

    def at_threshold(self, threshold: float) -> Pattern:
        """A pattern with the same probes that visits what reaches a mean attention weight, in place of a share of the
        cells.

        `share_among_layers` reads a prompt with it, to find what each layer needs.
        """
        raise TypeError(f"{self!r} asks for no share of the cells")

    def label(self) -> str:
        """What a picture's legend calls the pattern."""
        return self.name

    def colour(self) -> Colour:
        """The colour of the label in pictures; the default is made of the name."""
        number = zlib.crc32(self.label().encode())
        return ((number & 255) / 340 + 0.1, (number >> 8 & 255) / 340 + 0.1, (number >> 16 & 255) / 340 + 0.1)

    def official(self) -> tuple[int, int] | None:
        """The two numbers of an entry in MInference's own pattern files; None if they can't express this pattern."""
        return None

    @classmethod
    def from_official(cls, first: Any, second: Any) -> Pattern:
        """The pattern of such an entry. Raises ValueError or TypeError for numbers that are no budgets."""
        raise ValueError(f"{cls.name} has no official form")

    @classmethod
    def former_fields(cls, version: int) -> set[str]:
        """Fields that pattern files of this version may have beside today's."""
        return set()

    @classmethod
    def from_fields(cls, fields: dict[str, Any], version: int) -> Pattern:
        """The pattern of a pattern file's entry. `version`: of the file's format, so that old files still load.

        Raises TypeError or ValueError for fields that are unknown or out of range.
        """
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class PlanBuilder(Pattern):
    """An index of your own: subclass it, and write `build`. Takes the place of a pattern wherever one is accepted.

    A subclass is a frozen dataclass, registered as a pytree (`jax.tree_util.register_static` if it has no arrays).
    Heads that share one builder get their parts of the plan it builds; other heads of the layer may follow patterns.
    Array leaves have a leading layer axis in a model, which scans over them, and none where it is used for one layer.

    ```python
    @jax.tree_util.register_static
    @dataclasses.dataclass(frozen=True)
    class EveryOther(PlanBuilder):
        def build(self, q, k, *, lengths, q_offset, scale):
            return ...  # a pallas_kernels.SparsePlan
    ```
    """

    name: ClassVar[str] = "plan-builder"

    @abc.abstractmethod
    def build(
        self,
        q: Float[Array, "b t n h"],
        k: Float[Array, "b s k h"],
        *,
        lengths: Int[Array, " b"],
        q_offset: Int[Array, ""],
        scale: float,
    ) -> SparsePlan:
        """The plan for one layer's queries and keys.

        **Arguments:**

        - `q`: `[b, t, n, h]`; `k`: `[b, s, k, h]`, after position embedding.
        - `lengths`: int32 `[b]` in [0, s], where each sequence ends.
        - `q_offset`: int32 scalar, the position of the first query, a multiple of 128; may be traced.
        - `scale`: of the scores (static).

        **Returns:** a `SparsePlan` for b, n and t, whose widths depend on shapes and static fields only.
        """

    @classmethod
    def budgets(cls, heads: Sequence[Sequence[PlanBuilder | None]]) -> Budgets:
        return _Built(next(p for layer in heads for p in layer if p is not None))

    def visited(self, rows: int, keys: int, rates: IndexRates) -> float:
        # Nobody knows what a stranger's index visits; half of the cells keeps `auto` away where kernels are slow.
        return pairs(rows, keys, keys) / 2

    def check_candidate(self) -> None:
        raise TypeError(f"{self!r} is a plan builder, which has no budgets to scale")

    def label(self) -> str:
        return type(self).__name__


@partial(jax.tree_util.register_dataclass, data_fields=["builder"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Built(Budgets):
    builder: PlanBuilder

    def index(self, q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], where: Where) -> SparsePlan:
        return self.builder.build(q, k, lengths=where.lengths, q_offset=where.q_offset, scale=where.scale)


def check_budget(owner: str, name: str, value: object, low: int) -> None:
    """Raises TypeError unless `value` is an int, ValueError unless it lies between `low` and `MAX_BUDGET`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if not low <= value <= MAX_BUDGET:
        raise ValueError(f"{owner}: {name} must be between {low} and {MAX_BUDGET}, got {value}")


def check_share(owner: str, name: str, value: float | None, *, one: bool = True) -> None:
    """Raises ValueError unless `value` is None or a number in (0, 1], or with `one=False` in (0, 1)."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if not (0.0 < value < 1.0 or (one and value == 1.0)):
        raise ValueError(f"{owner}: {name} must be in (0, 1{']' if one else ')'}, got {value}")


def table(heads: Sequence[Sequence[Any]], value: Callable[[Any], float | int | bool], dtype: Any, none: Any) -> Array:
    """`value(pattern)` of every head, `[layers, heads]`; `none` where the head is of another family or gives None."""
    rows = [[none if p is None or value(p) is None else value(p) for p in layer] for layer in heads]
    return jnp.asarray(np.asarray(rows, dtype))


def members(heads: Sequence[Sequence[Any]]) -> list[Any]:
    """The heads of a family, without the None that stand for other heads; one entry for each distinct object."""
    return list({id(p): p for layer in heads for p in layer if p is not None}.values())


def part_of(budget: Int[Array, " n"], share: Float[Array, "b 1"]) -> Int[Array, "b n"]:
    """A share of a budget, rounded up; numbers that are no budget (0 and below) stay."""
    less = jnp.ceil(share * budget.astype(jnp.float32)).astype(jnp.int32)
    return jnp.where(budget > 0, less, budget)


def scaled_budget(value: int, factor: float, most: int, least: int = 0) -> int:
    """A budget times a factor, rounded, within bounds."""
    return min(max(round(value * factor), least), most)


def pairs(rows: int, keys: int, budget: float) -> float:
    """Cells that the last `rows` of `keys` positions visit when each sees min(position + 1, budget) keys."""
    first = keys - rows
    short = max(0.0, min(keys, budget) - first)  # rows that see everything before them
    return short * first + short * (short + 1) / 2 + (rows - short) * budget
