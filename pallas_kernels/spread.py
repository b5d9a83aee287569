"""Arrays that are spread over the devices of a mesh: every device works on its own sequences and heads.

A kernel is one operation to XLA's partitioner, and a loop over sequences and heads cannot be divided either: left to
itself, XLA would gather all arrays on every device. Attention, its gradients and the index need no other device's
sequences or heads, so `by_device` divides a call itself:

- axes of a mesh that are Auto: where the arrays lie is known only while XLA divides the program, and is asked then
  (`jax.experimental.custom_partitioning`); the backward pass then runs the forward pass again;
- Explicit axes: the arrays' types say where they lie, and the call is wrapped in `jax.shard_map`;
- Manual axes, inside a `jax.shard_map` of the caller: the call is left as it is.

What is divided otherwise, over positions or head_dim, is gathered.

Axes of arrays are written as one letter each: "b" sequences, "n" query heads, "k" KV heads, "." one that stays whole;
axes behind the last letter stay whole too. q is "b.n".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from pallas_kernels.device import on_target
from pallas_kernels.tracing import under_own_settings

Q_AXES, KV_AXES, PER_HEAD, PER_SEQUENCE, WHOLE = "b.n", "b.k", "bn", "b", ""
"""The axes of q and what has its shape; of k and v; of what has `[b, n]` in front, such as plans; of `[b]`; of none."""


def by_device(
    function: Callable[..., Any], arguments: tuple[Any, ...], axes: tuple[Any, ...], results: Any, **static: Hashable
) -> Any:
    """`function(*arguments, **static)`, divided over devices where the arguments are spread over several.

    **Arguments:**

    - `function`: of a module, since compiled calls are kept by it. Each result's sequence and head must depend on the
      same ones of the arguments only.
    - `axes`, `results`: the axes of the arguments and of the results, as letters; trees of them, or prefixes of trees.
    - `static`: hashable. One of the name `axis_name` gets the mesh axes over which heads are divided, if it is None.
    """
    mesh = next(filter(None, map(_divided_mesh, jax.tree.leaves(arguments))), None)
    if mesh is None:
        return function(*arguments, **static)
    leaves, tree = jax.tree.flatten(arguments)
    call = _Call(function, tuple(static.items()), tree, tuple(jax.tree.leaves(jax.tree.broadcast(axes, arguments))))
    shapes = jax.eval_shape(call.run, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))
    call = dataclasses.replace(call, results=tuple(jax.tree.leaves(jax.tree.broadcast(results, shapes))))
    run = _by_type(call, mesh) if AxisType.Explicit in mesh.axis_types else _by_partitioner(call)
    return jax.tree.unflatten(jax.tree.structure(shapes), run(*leaves))


def _divided_mesh(x: Any) -> Any:
    """The mesh of several devices that an array's type names, unless the caller has divided the work by hand."""
    mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types else mesh


@dataclasses.dataclass(frozen=True)
class _Call:
    """A function of the leaves of its arguments, and the axes of arguments and results as letters."""

    function: Callable[..., Any]
    static: tuple[tuple[str, Any], ...]
    tree: Any
    axes: tuple[str, ...]
    results: tuple[str, ...] = ()
    mapped: tuple[tuple[bool, ...], ...] = ()  # for each `jax.vmap` around the call, innermost first: which leaves

    def run(self, *leaves: Array, heads: tuple[str, ...] = ()) -> Any:
        static = dict(self.static)
        if heads and static.get("axis_name", heads) is None:
            static["axis_name"] = heads

        def call(*leaves: Array) -> Any:
            return self.function(*self.tree.unflatten(leaves), **static)

        for mapped in self.mapped:
            call = jax.vmap(call, in_axes=tuple(0 if one else None for one in mapped))
        return call(*leaves)

    def under_vmap(self, mapped: Sequence[bool]) -> _Call:
        """The call with a new leading axis of some leaves and of all results, which has a letter of its own."""
        letter = chr(ord("A") + len(self.mapped))
        axes = tuple(letter + one if new else one for one, new in zip(self.axes, mapped, strict=True))
        results = tuple(letter + one for one in self.results)
        return dataclasses.replace(self, axes=axes, results=results, mapped=(*self.mapped, tuple(mapped)))

    def local(self, split: _Split) -> Callable[..., Any]:
        """The call on one device's part of the leaves, and what it has of the results, all their leaves in a row."""
        heads = split.axes.get("n", ())
        one_of_few = bool(heads) and not split.divides_kv_heads  # a device's query heads share one of the KV heads

        def own(x: Array, axes: str) -> Array:
            if not one_of_few or "k" not in axes:
                return x
            return lax.dynamic_slice_in_dim(x, split.kv_head(), 1, axis=axes.index("k"))

        def whole(x: Array, axes: str) -> Array:
            letters = axes
            if one_of_few and "k" in axes:
                axis = axes.index("k")
                zeros = jnp.zeros((*x.shape[:axis], split.kv_heads, *x.shape[axis + 1 :]), x.dtype)
                x = lax.dynamic_update_slice_in_dim(zeros, x, split.kv_head(), axis=axis)
            elif "k" in axes:
                letters += "n"
            over = [name for letter, names in split.axes.items() if letter not in letters for name in names]
            return lax.psum(x, tuple(over)) if over else x

        @under_own_settings  # traced while XLA compiles, when those of the caller hold again
        def run(*leaves: Array) -> tuple[Array, ...]:
            found = jax.tree.leaves(self.run(*map(own, leaves, self.axes), heads=heads))
            return tuple(map(whole, found, self.results))

        return run


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """The function of a call's leaves and of its results' cotangents that gives the cotangents of the float leaves."""

    call: _Call
    floats: tuple[bool, ...]

    def __call__(self, *given: Array, axis_name: tuple[str, ...] | None) -> list[Array]:
        leaves, cotangents = given[: len(self.floats)], given[len(self.floats) :]

        def forward(*some: Array) -> list[Array]:
            rest = iter(some)
            every = (next(rest) if one else x for x, one in zip(leaves, self.floats, strict=True))
            return jax.tree.leaves(self.call.run(*every, heads=axis_name or ()))

        _, backward = jax.vjp(forward, *(x for x, one in zip(leaves, self.floats, strict=True) if one))
        return list(backward(list(cotangents)))

    @staticmethod
    def of(call: _Call, leaves: Sequence[Array]) -> _Call:
        floats = tuple(jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves)
        axes = call.axes + call.results
        results = tuple(one for one, is_float in zip(call.axes, floats, strict=True) if is_float)
        tree = jax.tree.structure(tuple(axes))
        return _Call(_Gradient(call, floats), (("axis_name", None),), tree, axes, results)


@dataclasses.dataclass(frozen=True)
class _Split:
    """Over which axes of a mesh each letter's axis is divided."""

    axes: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]  # of the mesh
    kv_heads: int

    @staticmethod
    def of(mesh: Any, axes: Sequence[str], shapes: Sequence[tuple[int, ...]], specs: Sequence[Any]) -> _Split:
        """As the first array with an axis of that letter has it: q, as calls are written. What does not go even is
        not divided."""
        found: dict[str, tuple[str, ...]] = {}
        sizes: dict[str, int] = {}
        for letters, shape, spec in zip(axes, shapes, specs, strict=True):
            for letter, size, names in zip(letters, shape, (*spec, *[None] * len(shape)), strict=False):
                sizes.setdefault(letter, size)
                names = (names,) if isinstance(names, str) else names if isinstance(names, tuple) else ()
                if names and letter != "." and not found.get(letter):
                    found[letter] = names
        split = _Split({}, dict(mesh.shape), sizes.get("k", 1))
        taken: set[str] = set()
        for letter in sorted(sizes.keys() - {".", "k"}):
            names = found.get(letter) or (found.get("k", ()) if letter == "n" else ())
            names = tuple(name for name in names if name not in taken)
            while names and not split._even(letter, sizes, names):
                names = names[:-1]
            taken |= set(names)
            split = dataclasses.replace(split, axes={**split.axes, letter: names})
        return split

    def _even(self, letter: str, sizes: Mapping[str, int], names: Sequence[str]) -> bool:
        parts = math.prod(self.sizes[name] for name in names)
        kv_heads = self.kv_heads if letter == "n" else parts
        return sizes[letter] % parts == 0 and (kv_heads % parts == 0 or parts % kv_heads == 0)

    @property
    def _parts(self) -> int:
        return math.prod(self.sizes[name] for name in self.axes.get("n", ()))

    @property
    def divides_kv_heads(self) -> bool:
        """Whether every device has KV heads of its own; else each has all of them, and uses one."""
        return self.kv_heads % self._parts == 0

    def kv_head(self) -> Array:
        """The KV head of this device's query heads, where it has not one of its own."""
        return lax.axis_index(self.axes["n"]) // (self._parts // self.kv_heads)

    def spec(self, axes: str) -> PartitionSpec:
        """Of an array with these axes."""
        letters = {**self.axes, "k": self.axes.get("n", ()) if self.divides_kv_heads else ()}
        return PartitionSpec(*(letters.get(letter) or None for letter in axes))


@lru_cache(maxsize=1024)
def _by_type(call: _Call, mesh: Any) -> Callable[..., tuple[Array, ...]]:
    """Explicit axes: the call under `jax.shard_map`, as the arrays' types say."""
    names = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}

    @jax.jit
    def run(*leaves: Array) -> tuple[Array, ...]:
        split = _Split.of(mesh, call.axes, [x.shape for x in leaves], [jax.typeof(x).sharding.spec for x in leaves])
        given, found = (tuple(map(split.spec, axes)) for axes in (call.axes, call.results))
        placed = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, given, strict=True)]
        spread = jax.shard_map(
            call.local(split), mesh=on_target(mesh), in_specs=given, out_specs=found, axis_names=names
        )
        return spread(*placed)

    return run


@lru_cache(maxsize=1024)
def _by_partitioner(call: _Call) -> Callable[..., tuple[Array, ...]]:
    """Auto axes: the call as one operation that says how it is divided, when XLA's partitioner asks."""

    def flat(*leaves: Array) -> tuple[Array, ...]:
        # Only traced, for the types of the results, never run. What depends on no argument, such as an A-shape plan,
        # must name the mesh too, for the next call to see it.
        found = tuple(jax.tree.leaves(call.run(*leaves)))
        of_mesh = next((x for x in leaves if _divided_mesh(x) is not None), None)
        return found if of_mesh is None else tuple(jnp.where((of_mesh == of_mesh).all(), x, x) for x in found)

    def partition(mesh: Any, arguments: Any, results: Any) -> tuple[Any, ...]:
        every = (*arguments, *results)
        specs = [x.sharding.spec for x in every]
        split = _Split.of(mesh, call.axes + call.results, [x.shape for x in every], specs)
        given, found = (
            tuple(NamedSharding(mesh, split.spec(one)) for one in axes) for axes in (call.axes, call.results)
        )
        return mesh, call.local(split), found, given

    divided = custom_partitioning(flat)
    divided.def_partition(partition, sharding_rule=lambda mesh, values, results: _rule(call, values, results))
    operation = jax.custom_batching.custom_vmap(divided)

    @operation.def_vmap
    def _(size: int, mapped: Sequence[bool], *leaves: Array) -> tuple[Any, Any]:
        found = _by_partitioner(call.under_vmap(mapped))(*leaves)
        return found, tuple(True for _ in found)

    @jax.custom_vjp
    def differentiable(*leaves: Array) -> tuple[Array, ...]:
        return operation(*leaves)

    def backward(leaves: tuple[Array, ...], cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
        gradient = _Gradient.of(call, leaves)
        found = iter(_by_partitioner(gradient)(*leaves, *cotangents))
        return tuple(next(found) if jnp.issubdtype(x.dtype, jnp.inexact) else None for x in leaves)

    differentiable.defvjp(lambda *leaves: (operation(*leaves), leaves), backward)
    return jax.jit(differentiable)


def _rule(call: _Call, values: Sequence[Any], results: Sequence[Any]) -> str:
    """In the partitioner's words: an axis of one letter is divided alike everywhere; any other as it likes."""
    numbers = iter(range(1 << 16))

    def words(axes: str, value: Any) -> str:
        letters = axes.ljust(len(value.shape), ".")
        return " ".join(f"x{next(numbers)}" if letter == "." else letter for letter in letters)

    given = ", ".join(map(words, call.axes, values))
    return f"{given} -> {', '.join(map(words, call.results, results))}"
