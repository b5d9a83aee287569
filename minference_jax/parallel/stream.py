"""Rows and heads exchanged in pieces: while one piece is on its way to the other devices, the next is computed.

Outside attention a device has some rows of all heads, inside it all rows of some heads (`exchange`). Sent at once, the
rows of a layer would keep every device waiting. A piece is sent as `[groups, b, rows, heads, h]`, with the heads of
each receiving device together, and is written so by what computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minference_jax.models.layers import map_chunks
from minference_jax.parallel.exchange import Exchange

PIECES, LEAST = 8, 2048
"""Pieces that a device's rows are cut into, and rows of one at least: an eighth of what is sent is waited for, and
fewer rows would leave matrix products below a GPU's rate. The program holds each piece by itself."""


def pieces_of(rows: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each piece."""
    size = max(LEAST, -(-rows // PIECES))
    return ((start, min(size, rows - start)) for start in range(0, rows, size))


def to_heads(
    exchange: Exchange, make: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...], t: int, chunk: int
) -> tuple[Float[Array, "b t heads h"], ...]:
    """`make(first_row, *rows)` of this device's rows, in chunks; of its results `[b, rows, n, h]` all t rows of this
    device's heads."""
    if exchange.size == 1:
        return map_chunks(make, arrays, chunk)
    rows = arrays[0].shape[1]

    def made(start: int, size: int) -> tuple[list[int], Array]:
        """Heads of each result on a device; and the results of a piece, which travel together."""
        parts = tuple(jax.lax.slice_in_dim(x, start, start + size, axis=1) for x in arrays)
        found = [exchange.grouped(x) for x in map_chunks(make, parts, chunk)]
        return [x.shape[3] for x in found], exchange.contiguous(jnp.concatenate(found, axis=3))

    pieces = pieces_of(rows)
    start, size = next(pieces)
    heads, piece = made(start, size)
    into = [jax.lax.empty((*piece.shape[:2], rows, n, piece.shape[4]), piece.dtype) for n in heads]
    while size:
        sent, at = exchange.swap(piece), start
        start, size = next(pieces, (rows, 0))
        if size:  # what was sent is put in its place only after the next piece is computed
            sent, piece = jax.lax.optimization_barrier((sent, made(start, size)[1]))
        parts = jnp.split(sent, np.cumsum(heads)[:-1], axis=3)
        into = [jax.lax.dynamic_update_slice_in_dim(x, part, at, axis=2) for x, part in zip(into, parts, strict=True)]
    return tuple(exchange.all_rows_of_heads(x, t) for x in into)


def to_rows(
    exchange: Exchange,
    finish: Callable[..., Array],
    x: Float[Array, "b rows d"],
    out: Float[Array, "b own heads h"],
    chunk: int,
) -> Float[Array, "b rows d"]:
    """x with `finish(first_row, x's rows, out's rows of all heads)` in place of its rows, in chunks.

    `out`: of this device's heads, the rows that it attends for (`Exchange.own_queries`).
    """
    if exchange.size == 1:
        return map_chunks(finish, (x, out), chunk, in_place=True)
    rows = x.shape[1]
    out = jnp.pad(out, [(0, 0), (0, exchange.heads * rows - out.shape[1]), (0, 0), (0, 0)])
    out = jnp.moveaxis(out.reshape(out.shape[0], exchange.heads, rows, *out.shape[2:]), 1, 0)

    def received(start: int, size: int) -> Array:
        return exchange.swap(exchange.contiguous(jax.lax.slice_in_dim(out, start, start + size, axis=2)))

    def joined(first: Array, x: Array, attended: Array) -> Array:
        return finish(first, x, exchange.joined(jnp.moveaxis(attended, 1, 2)))

    pieces = list(pieces_of(rows))
    following = received(*pieces[0])
    for i, (start, size) in enumerate(pieces):
        attended = following
        if i + 1 < len(pieces):
            following = received(*pieces[i + 1])
        piece = jax.lax.slice_in_dim(x, start, start + size, axis=1)
        piece = map_chunks(joined, (piece, jnp.moveaxis(attended, 2, 1)), chunk, in_place=True)
        x = jax.lax.dynamic_update_slice_in_dim(x, piece, start, axis=1)
    return x
