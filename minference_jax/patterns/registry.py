"""Which families of patterns there are: the one table by which files, command line, pictures and search find them."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from minference_jax.patterns.a_shape import AShape
from minference_jax.patterns.antidiagonal import Antidiagonal
from minference_jax.patterns.base import Pattern
from minference_jax.patterns.block_sparse import BlockSparse
from minference_jax.patterns.dense import Dense
from minference_jax.patterns.per_tile import PerTile
from minference_jax.patterns.query_aware import QueryAware
from minference_jax.patterns.shared_density import SharedDensity
from minference_jax.patterns.vertical_slash import VerticalSlash

FAMILIES: dict[str, type[Pattern]] = {}
"""The families by name, in the order in which they are shown."""


def register(family: type[Pattern]) -> type[Pattern]:
    """Adds a family, under its `name`; usable as a decorator. Its patterns become static arguments under jit.

    Raises ValueError if another family has the name.
    """
    known = FAMILIES.get(family.name)
    if known is not None and known is not family:
        raise ValueError(f"pattern name {family.name!r} of {family.__name__} is taken by {known.__name__}")
    if known is None:
        jax.tree_util.register_static(family)
        FAMILIES[family.name] = family
    return family


def family(name: str) -> type[Pattern]:
    """The family of this name. Raises ValueError that lists the names, if there is none."""
    if name not in FAMILIES:
        raise ValueError(f"unknown pattern {name!r}; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def official_families() -> Iterator[type[Pattern]]:
    """The families that MInference's own pattern files know."""
    return (found for found in FAMILIES.values() if found.official_name is not None)


for _family in (Dense, AShape, VerticalSlash, BlockSparse, PerTile, SharedDensity, Antidiagonal, QueryAware):
    register(_family)
