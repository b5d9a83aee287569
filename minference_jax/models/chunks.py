"""Running a function in chunks of the sequence, each of them known together with the array that it is a part of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.rows.place import Place
from pallas_kernels.tracing import vary_alike


class Slice(NamedTuple):
    """`rows` of a longer array: those of `whole` from row `start` of each sequence on.

    Kernels read them in `whole`; XLA would copy a slice for them first.
    """

    rows: Shaped[Array, "b c *in"]
    whole: Shaped[Array, "b t *in"]
    start: Int32[Array, ""]

    def flat(self) -> Slice:
        """With all of a row's axes as one."""
        return Slice(flat(self.rows), flat(self.whole), self.start)


class Apart(NamedTuple):
    """Rows whose heads are cut into equal groups, each a slice of another array: the i-th has group `groups[i]`.

    Kernels read them there; to join them first would be a copy.
    """

    slices: tuple[Slice, ...]
    groups: Int32[Array, " n"]

    @property
    def rows(self) -> Shaped[Array, "b c *in"]:
        """Joined."""
        first = self.slices[0].rows
        b, c, heads, *inner = first.shape
        joined = jax.lax.empty((b, c, len(self.slices), heads, *inner), first.dtype)
        for i, piece in enumerate(self.slices):
            joined = jax.lax.dynamic_update_index_in_dim(joined, piece.rows, self.groups[i], axis=2)
        return joined.reshape(b, c, -1, *inner)

    def flat(self) -> Apart:
        """With all of a row's axes as one."""
        return Apart(tuple(piece.flat() for piece in self.slices), self.groups)


@dataclass(frozen=True)
class Unplaced:
    """Rows of heads that are made on the way to their place in another array: to make them first would be a copy.

    `place(into, at, heads)` is `into` `[B, T, N, h]` with so many of their heads there (`placed_rows`), `value()` the
    rows alone.
    """

    shape: tuple[int, ...]
    dtype: Any
    place: Callable[[Shaped[Array, "B T N h"], Place, int], Shaped[Array, "B T N h"]]
    value: Callable[[], Shaped[Array, "b c n h"]]

    @property
    def rows(self) -> Shaped[Array, "b c n h"]:
        """For whoever wants them elsewhere."""
        return self.value()


def plain(x: Float[Array, "b t *in"] | Slice | Apart | Unplaced) -> Float[Array, "b t *in"]:
    """The rows themselves."""
    return x.rows if isinstance(x, (Slice, Apart, Unplaced)) else x


def put(into: Shaped[Array, "b t *in"], rows: Array | Unplaced, start: Any) -> Shaped[Array, "b t *in"]:
    """`into` with these rows from `start` on."""
    if isinstance(rows, Unplaced):
        return rows.place(into, Place(row=start), rows.shape[2])
    return jax.lax.dynamic_update_slice_in_dim(into, rows, start, axis=1)


def put_heads(
    into: Shaped[Array, "B T N h"], rows: Shaped[Array, "b c n h"] | Unplaced, at: Place, heads: int
) -> Shaped[Array, "B T N h"]:
    """`into` with so many heads of these rows there; no place in `at` is negative.

    XLA stores 8 bytes at once with a row's numbers on one axis; with an axis for heads it stored some 2 at once.
    """
    if isinstance(rows, Unplaced):
        return rows.place(into, at, heads)
    h, numbers = into.shape[3], flat(rows)
    if heads < rows.shape[2]:
        numbers = slice_of(numbers, at.first * h, heads * h, axis=2)
    start = at.sequence, at.row, at.head * h
    return jax.lax.dynamic_update_slice(flat(into), numbers, start, allow_negative_indices=False).reshape(into.shape)


slice_of = partial(jax.lax.dynamic_slice_in_dim, allow_negative_indices=False)
"""To allow for negative starts costs instructions in each kernel."""


def alone(rows: Array | Unplaced) -> Array:
    """Rows as an array of their own."""
    return put(jax.lax.empty(rows.shape, rows.dtype), rows, 0) if isinstance(rows, Unplaced) else rows


def flat(x: Any) -> Any:
    """Rows with all of their axes as one."""
    return x.flat() if isinstance(x, (Slice, Apart)) else x.reshape(*x.shape[:2], -1)


def slices(arrays: tuple[Array, ...], start: Any, size: int) -> tuple[Slice, ...]:
    """Rows `start` … `start + size - 1` of each."""
    if size == arrays[0].shape[1]:
        return tuple(Slice(a, a, jnp.int32(0)) for a in arrays)
    first = jnp.int32(start)
    return tuple(Slice(jax.lax.dynamic_slice_in_dim(a, first, size, axis=1), a, first) for a in arrays)


def fold_chunks(step: Callable[[Any, Any, int], Any], out: Any, t: int, chunk: int) -> Any:
    """`out = step(out, start, size)` of chunks of `chunk` rows of t, in order; the last may be shorter.

    Such a last one is compiled separately, and so is a single one.
    """
    if t <= chunk:
        return step(out, 0, t)
    out = jax.lax.fori_loop(0, t // chunk, lambda i, o: step(o, i * chunk, chunk), out)
    return step(out, t - t % chunk, t % chunk) if t % chunk else out


def map_chunks(fn: Callable[..., Any], arrays: tuple[Array, ...], chunk: int, *, in_place: bool = False) -> Any:
    """`fn(*slices)` of chunks of `chunk` rows along axis 1, a `Slice` of each array; its results put together again.

    Bounds the memory of what `fn` makes on the way: an MLP over a million tokens would hold 29 GB at once.
    `fn` must treat rows independently; its results have the rows on axis 1 too, or are `Unplaced`. With `in_place`, it
    returns one array like `arrays[0]`, which the results replace chunk by chunk: in the `whole` of that slice, those
    before it are replaced already. A last, shorter chunk is compiled separately.
    """
    t = arrays[0].shape[1]
    if t <= chunk:
        return jax.tree.map(alone, fn(*slices(arrays, 0, t)))

    def step(out: Any, start: Any, size: int) -> Any:
        pieces = fn(*slices((out, *arrays[1:]) if in_place else arrays, start, size))
        return jax.tree.map(lambda o, p: put(o, p, start), out, pieces)

    out: Any = arrays[0]
    if not in_place:
        shapes = jax.eval_shape(lambda *arrays: jax.tree.map(plain, fn(*slices(arrays, 0, chunk))), *arrays)
        out = jax.tree.map(lambda s: jax.lax.empty((s.shape[0], t, *s.shape[2:]), s.dtype), shapes)
        out = vary_alike(out, arrays)
    return fold_chunks(step, out, t, chunk)
