"""One pattern for each query head: of a model (`HeadPatterns`), and as arrays that a scan over layers takes along."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minference_jax.patterns.base import Budgets, Pattern, PlanBuilder
from minference_jax.patterns.text import as_pattern
from pallas_kernels.spread import PER_HEAD, PER_SEQUENCE, WHOLE


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kind", "budgets", "unspent"],
    meta_fields=["families", "covers", "dense"],
)
@dataclasses.dataclass(frozen=True)
class LayerPatterns:
    """Head patterns as arrays, which `jax.lax.scan` over layers takes along, and which may be traced arguments.

    - `kind`: int32 `[layers, heads]`, which entry of `budgets` a head follows.
    - `budgets`: one for each family that occurs; their leaves begin with `[layers, heads]`.
    - `families` (static): the names of the families, in the order of `budgets`.
    - `covers` (static): up to so many keys, every head visits every causal cell.
    - `dense` (static): the number of the family that is dense attention; −1 if none is.
    - `unspent`: float32 `[b]`, only in a model's layer loop: the density that earlier layers left to this one, in each
      sequence, summed over heads. `sparse_attention` then also returns, last, what is left after it.

    Scanning over it, or `layer`, gives one layer's, with leaves `[heads]`. That is what `make_plan` and
    `sparse_attention` accept.
    """

    kind: Int[Array, "*layers n"]
    budgets: tuple[Budgets, ...]
    families: tuple[str, ...]
    covers: int
    dense: int = -1
    unspent: Float[Array, " b"] | None = None

    def layer(self, index: int) -> LayerPatterns:
        """Layer `index`, with leaves `[heads]`."""
        with jax.debug_infs(False):  # an infinite threshold stands for none
            return jax.tree.map(lambda leaf: leaf[index], self)

    def chosen(self) -> list[tuple[Bool[Array, " n"] | None, Budgets]]:
        """For each family that occurs, which heads follow it, and its budgets; None where all heads do."""
        if len(self.budgets) == 1:
            return [(None, self.budgets[0])]
        return [(self.kind == code, budgets) for code, budgets in enumerate(self.budgets)]

    @property
    def built(self) -> bool:
        """Whether a plan builder occurs, which sees all heads of a layer at once."""
        return any(isinstance(leaf, Pattern) for leaf in jax.tree.leaves(self, is_leaf=_is_pattern))

    def axes(self) -> LayerPatterns:
        """For each leaf of one layer, `[heads]` or `[b, heads]`, its axes as `pallas_kernels.spread` writes them.

        Heads stay whole beside a plan builder. Its own arrays have any shape, and stay whole altogether.
        """
        letters = PER_SEQUENCE + "." if self.built else PER_HEAD

        def own(leaf: Any) -> str:
            return WHOLE if _is_pattern(leaf) else letters[-leaf.ndim :]

        axes = jax.tree.map(own, dataclasses.replace(self, unspent=None), is_leaf=_is_pattern)
        return axes if self.unspent is None else dataclasses.replace(axes, unspent=PER_SEQUENCE)

    def begin(self, b: int) -> Float[Array, " b"] | None:
        """What is left over before the first layer: nothing; None where no layer ever leaves anything."""
        leaves = any(budgets.shares() is not None for budgets in self.budgets)
        return jnp.zeros((b,), jnp.float32) if leaves else None

    def left(self, density: Float[Array, "b n"], axis_name: str | None) -> Float[Array, " b"] | None:
        """What a layer leaves to the next: what its heads could spend, together, less what they visited.

        **Arguments:** `density`: what each head visited, `[b, n]`. `axis_name`: as for `make_plan`.
        """
        if self.unspent is None:
            return None
        could, visited = jnp.float32(0), jnp.zeros_like(self.unspent)
        for chosen, budgets in self.chosen():
            shares = budgets.shares()
            if shares is not None:
                own = jnp.isfinite(shares) if chosen is None else jnp.isfinite(shares) & chosen
                could = could + jnp.where(own, shares, 0).sum()
                visited = visited + jnp.where(own, density, 0).sum(-1)
        if axis_name is not None:
            could, visited = (jax.lax.psum(x, axis_name) for x in (could, visited))
        return jnp.maximum(self.unspent + could - visited, 0)

    def all_dense(self) -> Bool[Array, ""] | None:
        """Whether every head of this layer is dense, which the layer decides; None if no layer has a dense head."""
        return None if self.dense < 0 else jnp.all(self.kind == self.dense)

    def for_part(self, seen: Int[Array, " b"], lengths: Int[Array, " b"]) -> LayerPatterns:
        """One layer's patterns for a part of a prompt that ends at `seen` of `lengths`.

        A part that ends at e of s tokens needs √(e / s) of the budgets that are meant for the whole prompt; each family
        says which of its budgets these are. They get a batch axis, `[b, heads]`.
        """
        share = jnp.sqrt(seen.astype(jnp.float32) / jnp.maximum(lengths, 1).astype(jnp.float32))[:, None]
        return dataclasses.replace(self, budgets=tuple(budgets.for_part(share) for budgets in self.budgets))

    def widest(self, keys: int) -> LayerPatterns:
        """The same with static widths that hold any budget for `keys` keys: one compiled program serves all budgets.

        It is never served as dense attention, so that what is measured is the plan.
        """
        return dataclasses.replace(self, budgets=tuple(budgets.widest(keys) for budgets in self.budgets), covers=0)


@dataclasses.dataclass(frozen=True, eq=False)
class HeadPatterns:
    """One pattern for each query head of each layer: `layers[layer][head]`, each a pattern or its text. Hashable.

    A pattern search adds three numbers for each head. Nothing in this package acts on them:

    - `scores`: the relative error of the head's output (in the original's files, whatever its search wrote).
    - `densities`: visited / causal cells.
    - `recalls`: the share of the dense softmax mass on visited keys.

    **Raises:** ValueError if there is no layer or no head, or if layers differ in their number of heads; TypeError if
    an entry is no pattern.
    """

    layers: tuple[tuple[Pattern, ...], ...]
    scores: tuple[tuple[float, ...], ...] | None = None
    densities: tuple[tuple[float, ...], ...] | None = None
    recalls: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        given: Any = tuple(self.layers)
        different = {id(layer): layer for layer in given}  # often one, for all layers
        parsed = {p: as_pattern(p) for layer in different.values() for p in layer if isinstance(p, str)}
        made = {key: tuple(parsed[p] if isinstance(p, str) else p for p in layer) for key, layer in different.items()}
        object.__setattr__(self, "layers", tuple(made[id(layer)] for layer in given))
        heads = {len(layer) for layer in self.layers}
        if not self.layers or heads == {0}:
            raise ValueError("HeadPatterns needs at least one layer and one head")
        if len(heads) > 1:
            counts = [len(layer) for layer in self.layers]
            odd = next(i for i, count in enumerate(counts) if count != counts[0])
            raise ValueError(f"HeadPatterns: layer {odd} has {counts[odd]} heads, layer 0 has {counts[0]}")
        for pattern in self.distinct():
            if not isinstance(pattern, Pattern):
                places = ((i, j) for i, layer in enumerate(self.layers) for j, p in enumerate(layer) if p is pattern)
                index, head = next(places)
                raise TypeError(f"HeadPatterns: layer {index}, head {head} is {pattern!r}, which is no pattern")
        _check_registered(self.distinct())
        for name in ("scores", "densities", "recalls"):
            figures = getattr(self, name)
            if figures is None:
                continue
            object.__setattr__(self, name, tuple(tuple(layer) for layer in figures))
            if [len(layer) for layer in figures] != [len(layer) for layer in self.layers]:
                raise ValueError(f"HeadPatterns: {name} and layers differ in shape")

    @classmethod
    def uniform(cls, pattern: Pattern | str, layers: int, heads: int) -> HeadPatterns:
        """The same pattern for every head."""
        return cls(((as_pattern(pattern),) * heads,) * layers)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Query heads per layer."""
        return len(self.layers[0])

    @property
    def dense(self) -> bool:
        """Whether every head of every layer is dense attention."""
        return all(pattern.dense for pattern in self.distinct())

    @property
    def builders(self) -> list[PlanBuilder]:
        """The plan builders among the patterns."""
        return [p for p in self.distinct() if isinstance(p, PlanBuilder)]

    def layer(self, index: int) -> tuple[Pattern, ...]:
        """The patterns of one layer's heads."""
        return self.layers[index]

    def distinct(self) -> list[Pattern]:
        """Every pattern object that occurs, once."""
        layers = {id(layer): layer for layer in self.layers}.values()
        return list({id(p): p for layer in layers for p in layer}.values())

    def __iter__(self) -> Iterator[tuple[Pattern, ...]]:
        return iter(self.layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadPatterns) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        # Plan builders may hold arrays, which have no hash and no plain equality: such a builder equals itself only.
        layers = tuple(tuple(map(_identity, layer)) for layer in self.layers)
        return layers, self.scores, self.densities, self.recalls

    def arrays(self) -> LayerPatterns:
        """Kinds and budgets as arrays with a leading layer axis; see `LayerPatterns`."""
        return _arrays(self.layers)


def layer_patterns(pattern: Pattern | str | Sequence[Pattern | str] | LayerPatterns, heads: int) -> LayerPatterns:
    """One layer's patterns, given in any accepted form, as arrays `[heads]`.

    **Arguments:** `pattern`: one pattern (or plan builder) for all heads, one per head, or one layer's `LayerPatterns`.
    A pattern may be given as text.

    **Raises:** TypeError for anything that is no pattern; ValueError for the wrong number of heads, and for a text that
    is no pattern's.
    """
    if isinstance(pattern, LayerPatterns):
        if pattern.kind.shape != (heads,):
            raise ValueError(f"pattern arrays have shape {pattern.kind.shape}; expected ({heads},), one layer's heads")
        return pattern
    own = patterns_of_heads(pattern, heads)
    stacked = {id(p): jax.tree.map(lambda x: jnp.asarray(x)[None], p) for p in own if isinstance(p, PlanBuilder)}
    return _arrays((tuple(stacked.get(id(p), p) for p in own),)).layer(0)


def patterns_of_heads(pattern: Pattern | str | Sequence[Pattern | str], heads: int) -> Sequence[Pattern]:
    """One pattern for each head of a layer, from what `layer_patterns` accepts but arrays; raises as it does."""
    if isinstance(pattern, HeadPatterns):
        raise TypeError("pattern is a HeadPatterns of a whole model; pass one layer's: patterns.layer(l) or .arrays()")
    if isinstance(pattern, Pattern | str):
        pattern = (as_pattern(pattern),) * heads
    if isinstance(pattern, Sequence):
        pattern = tuple(as_pattern(p) for p in pattern)
    if not isinstance(pattern, Sequence) or any(not isinstance(p, Pattern) for p in pattern):
        raise TypeError(f"pattern must be a pattern, one pattern per head or LayerPatterns, got {pattern!r}")
    if len(pattern) != heads:
        raise ValueError(f"pattern has {len(pattern)} entries; q has {heads} heads")
    _check_registered(pattern)
    return pattern


def _check_registered(patterns: Iterable[Pattern]) -> None:
    """Raises TypeError for a plan builder that JAX does not know: it could not be passed to compiled functions."""
    for pattern in {id(p): p for p in patterns if isinstance(p, PlanBuilder)}.values():
        if jax.tree_util.all_leaves([pattern]):
            raise TypeError(
                f"{pattern!r} is no pytree: put @jax.tree_util.register_static over {type(pattern).__name__}, or "
                "jax.tree_util.register_dataclass if it holds arrays"
            )


def _is_pattern(leaf: Any) -> bool:
    return isinstance(leaf, Pattern)


def _identity(pattern: Pattern) -> Any:
    try:
        hash(pattern)
    except TypeError:
        return id(pattern)
    return pattern


def _arrays(layers: tuple[tuple[Pattern, ...], ...]) -> LayerPatterns:
    patterns = {id(p): p for layer in layers for p in layer}.values()
    # A family is a class; every plan builder is one of its own. Sorted by name, so that the order of heads is no part
    # of a compiled program.
    families: dict[Any, Pattern] = {}
    for pattern in patterns:
        families.setdefault(_family(pattern), pattern)
    order = sorted(families, key=lambda family: families[family].name)
    code = {family: i for i, family in enumerate(order)}
    kinds = [[code[_family(p)] for p in layer] for layer in layers]

    def own(family: Any) -> list[list[Pattern | None]]:
        return [[p if _family(p) == family else None for p in layer] for layer in layers]

    names = tuple(families[family].name for family in order)
    with jax.debug_infs(False):  # an infinite threshold stands for none
        budgets = tuple(type(families[family]).budgets(own(family)) for family in order)
    return LayerPatterns(
        kind=jnp.asarray(np.asarray(kinds, np.int32)),
        budgets=budgets,
        families=names,
        covers=min(p.covers() for p in patterns),
        dense=next((code[family] for family in order if families[family].dense), -1),
    )


def _family(pattern: Pattern) -> Any:
    return _identity(pattern) if isinstance(pattern, PlanBuilder) else type(pattern)
