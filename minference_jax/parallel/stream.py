"""Rows and heads exchanged in pieces: while one piece is on its way to the other devices, the next is computed.

Outside attention a device has some rows of all heads, inside it all rows of some heads (`exchange`). Sent at once, the
rows of a layer would keep every device waiting. So the residual stream is cut into pieces, arrays of their own. Of each
a device keeps its own heads, or rows, and sends the others theirs. Nothing is moved beside that: what computes queries,
keys and values writes them where attention reads them or as they travel, what arrives from other devices is put in its
place there, and on the way back it is read from where it lies (`Apart`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from minference_jax.models.chunks import (
    Apart,
    Slice,
    Unplaced,
    fold_chunks,
    map_chunks,
    plain,
    put_heads,
    slice_of,
    slices,
)
from minference_jax.parallel.exchange import Exchange
from pallas_kernels.rows.place import Place

Pieces = tuple[Float[Array, "b _ d"], ...]
"""Some rows in order, in one piece where no other device has heads of its own."""

Heads = tuple[Array, ...]
"""Queries, keys and values of some heads."""

PIECES, LEAST = 8, 2048
"""Pieces that a device's rows are cut into, about, and rows of one at least. The program holds each by itself."""


def cut(exchange: Exchange, x: Float[Array, "b rows d"], chunk: int) -> Pieces:
    """A device's rows as pieces, of whole chunks where there are as many.

    The last piece to heads and the first one back are waited for, so these are short. A piece is sent while the next is
    computed, which to heads takes two to four times as long (of an 8B model in FP8 on 8 and 2 H200s, by arithmetic):
    so each may have half as many rows as the one before. To heads the longest come first.
    """
    rows = x.shape[1]
    if exchange.heads == 1 or rows <= LEAST:
        return (x,)
    end = max(LEAST, min(chunk, rows // PIECES))
    most = -(-rows // (PIECES * chunk)) * chunk
    sizes, size, left = [], end, rows - end
    while left > 0:
        sizes.append(min(size, left))
        left, size = left - sizes[-1], min(2 * size, most)
    sizes = [end, *reversed(sizes)]
    starts = np.cumsum([0, *sizes])
    return tuple(x[:, start : start + size] for start, size in zip(starts[:-1], sizes, strict=True))


def whole(x: Pieces) -> Float[Array, "b rows d"]:
    """The way back from `cut`."""
    return x[0] if len(x) == 1 else jnp.concatenate(x, axis=1)


def to_heads(
    exchange: Exchange,
    make: Callable[..., tuple[Array, ...]],
    x: Pieces,
    positions: Int32[Array, "_ rows"],
    t: int,
    chunk: int,
) -> tuple[Float[Array, "b t heads h"], ...]:
    """`make(rows, positions)` of all pieces, in chunks, `rows` as a `Slice`; of its results `[b, rows, n, h]` all
    t rows of this device's heads."""

    def of_chunk(rows: Slice, positions: Slice) -> tuple[Array | Unplaced, ...]:
        return make(rows, positions.rows)

    if exchange.heads == 1:
        found = map_chunks(of_chunk, (x[0], positions), chunk)
        return found if exchange.size == 1 else tuple(exchange.all_rows_of_heads(y, t) for y in found)
    starts, (own, *others) = _starts(x), exchange.groups()
    rows = starts[-1] + x[-1].shape[1]
    shapes = jax.eval_shape(lambda *of: tuple(map(plain, of_chunk(*of))), *slices((x[0], positions), 0, 1))
    counts = [y.shape[2] // exchange.heads for y in shapes]
    *heads, total = (int(n) for n in np.cumsum([0, *counts]))
    b, h, dtype = shapes[0].shape[0], shapes[0].shape[3], shapes[0].dtype

    def made(into: Heads, piece: Array, first_row: int) -> tuple[Heads, Array]:
        """A piece computed: this device's heads put in their place, and those of each other one, together."""
        arrays = piece, positions[:, first_row : first_row + piece.shape[1]]

        def of_own_and_others(carry: tuple[Heads, Array], start: Any, size: int) -> tuple[Heads, Array]:
            into, given = carry
            found = of_chunk(*slices(arrays, start, size))
            row = own * rows + first_row + start
            places = zip(into, found, counts, strict=True)
            into = tuple(put_heads(x, y, Place(row=row, first=own * n), n) for x, y, n in places)
            for group, (y, n, head) in product(others, zip(found, counts, heads, strict=True)):
                given = put_heads(given, y, Place(exchange.part(group) * b, start, head, group * n), n)
            return into, given

        given = jax.lax.empty((exchange.parts * b, piece.shape[1], total, h), dtype)
        return fold_chunks(of_own_and_others, (into, given), piece.shape[1], chunk)

    def with_arrived(into: Heads, arrived: Array, first_row: int) -> Heads:
        """This device's heads of the other devices' rows put in their place."""
        for group in others:
            found, row = slice_of(arrived, exchange.part(group) * b, b, axis=0), group * rows + first_row
            places = zip(into, heads, counts, strict=True)
            into = tuple(put_heads(y, found, Place(row=row, first=head), n) for y, head, n in places)
        return into

    into = tuple(jax.lax.empty((b, exchange.heads * rows, n, h), dtype) for n in counts)
    # Two H200s waited for a first piece that was short: XLA sent it only once the second was computed (65b749f).
    order = sorted(range(len(x)), key=lambda i: -x[i].shape[1])
    into, given = made(into, x[order[0]], starts[order[0]])
    for i, after in zip(order, [*order[1:], None], strict=True):
        arrived = exchange.swap(given)
        if after is not None:  # computed after this one, and before what is sent of this is put in its place
            *_, into, following = jax.lax.optimization_barrier((given, into, x[after]))
            into, given = made(into, following, starts[after])
        arrived, into = jax.lax.optimization_barrier((arrived, into))
        into = with_arrived(into, arrived, starts[i])
    # Without a barrier XLA puts the last piece in its place in all that reads it, and copies the rest for that.
    return tuple(exchange.all_rows_of_heads(y, t) for y in jax.lax.optimization_barrier(into))


def to_rows(
    exchange: Exchange, finish: Callable[..., Array], x: Pieces, out: Float[Array, "b own heads h"], chunk: int
) -> Pieces:
    """`finish(x's rows, out's rows of all heads)` of all pieces, in chunks: `Slice`s, or x's and an `Apart`.

    `out`: of this device's heads, the rows that it attends for (`Exchange.own_queries`).
    """
    starts = _starts(x)
    rows = starts[-1] + x[-1].shape[1]
    out = jnp.pad(out, [(0, 0), (0, exchange.heads * rows - out.shape[1]), (0, 0), (0, 0)])
    if exchange.heads == 1:
        return (map_chunks(finish, (x[0], out), chunk, in_place=True),)
    own, *others = exchange.groups()

    def of_device(x: Array, part: Array, parts: int, start: Any, size: int) -> Slice:
        """Of as many rows for, or from, each device some of those of one of them."""
        first = part * (x.shape[1] // parts) + start
        return Slice(slice_of(x, first, size, axis=1), x, first)

    def sent(out: Array, i: int) -> Array:
        size = x[i].shape[1]
        given = jax.lax.empty((exchange.parts, out.shape[0], size, *out.shape[2:]), out.dtype)
        for group in others:
            rows_of_device = of_device(out, group, exchange.heads, starts[i], size).rows[None]
            at = (exchange.part(group), 0, 0, 0, 0)
            given = jax.lax.dynamic_update_slice(given, rows_of_device, at, allow_negative_indices=False)
        arrived = jnp.moveaxis(exchange.swap(given), 0, 1)
        return arrived.reshape(arrived.shape[0], -1, *arrived.shape[3:])

    def of_piece(i: int, out: Array, arrived: Array) -> Array:
        def of_chunk(x: Slice) -> Array:
            size = x.rows.shape[1]
            heads = (of_device(out, own, exchange.heads, starts[i] + x.start, size),)
            parts = (exchange.part(group) for group in others)
            heads += tuple(of_device(arrived, part, exchange.parts, x.start, size) for part in parts)
            return finish(x, Apart(heads, jnp.stack([own, *others])))

        return map_chunks(of_chunk, (x[i],), chunk, in_place=True)

    finished, arrived = [], sent(out, 0)
    for i in range(len(x)):
        following = None
        if i + 1 < len(x):  # what is next is sent once this is there, and taken once this piece is finished
            out, arrived = jax.lax.optimization_barrier((out, arrived))
            following = sent(out, i + 1)
        result = of_piece(i, out, arrived)
        arrived, result = jax.lax.optimization_barrier((following, result))
        finished.append(result)
    return tuple(finished)


def _starts(x: Pieces) -> list[int]:
    """The first row of each piece."""
    return [int(start) for start in np.cumsum([0, *(piece.shape[1] for piece in x[:-1])])]
