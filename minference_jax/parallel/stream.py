"""Rows and heads exchanged in pieces: while one piece is on its way to the other devices, the next is computed.

Outside attention a device has some rows of all heads, inside it all rows of some heads (`exchange`). Sent at once, the
rows of a layer would keep every device waiting. So the residual stream is cut into pieces, arrays of their own. What
one gives for attention travels as `[groups, b, rows, heads, h]`, with the heads of each receiving device together, and
is written so by what computes it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from minference_jax.models.chunks import Slice, map_chunks
from minference_jax.parallel.exchange import Exchange

Pieces = tuple[Float[Array, "b _ d"], ...]
"""Some rows in order, on one device all of them in one piece."""

PIECES, LEAST = 8, 2048
"""Pieces that a device's rows are cut into, and rows of one at least. The last piece to heads and the first one back
are waited for; the program holds each piece by itself. On two H200s (1M tokens, FP8, commit 98dc82f) the kernels of a
layer take 290 ms and what is sent 14 ms, together 293. Products of 8,192 rows take 6 % longer a row than those of
16,384 (67d022b). Other numbers of pieces were not measured."""


def cut(exchange: Exchange, x: Float[Array, "b rows d"]) -> Pieces:
    """A device's rows as pieces."""
    rows = x.shape[1]
    size = rows if exchange.size == 1 else max(LEAST, -(-rows // PIECES))
    return tuple(x[:, start : start + size] for start in range(0, rows, size))


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

    def of_chunk(rows: Slice, positions: Slice) -> tuple[Array, ...]:
        return make(rows, positions.rows)

    if exchange.size == 1:
        return map_chunks(of_chunk, (x[0], positions), chunk)
    starts = np.cumsum([0, *(piece.shape[1] for piece in x)])

    def grouped(rows: Slice, positions: Slice) -> list[Array]:
        return [exchange.grouped(y) for y in of_chunk(rows, positions)]

    def joined(rows: Slice, positions: Slice) -> Array:
        """The results of a chunk as they travel: together, and so laid out."""
        return exchange.contiguous(jnp.concatenate(grouped(rows, positions), axis=3))

    def made(i: int) -> Array:
        return map_chunks(joined, (x[i], positions[:, starts[i] : starts[i + 1]]), chunk, axis=2)

    update = jax.lax.dynamic_update_slice_in_dim
    first = positions[:, : starts[1]]
    heads = [y.shape[3] for y in jax.eval_shape(grouped, *(Slice(y, y, jnp.int32(0)) for y in (x[0], first)))]
    piece = made(0)
    into = [jax.lax.empty((*piece.shape[:2], starts[-1], n, piece.shape[4]), piece.dtype) for n in heads]
    for i in range(len(x)):
        sent = exchange.swap(piece)
        if i + 1 < len(x):  # what was sent is put in its place only after the next piece is computed
            sent, piece = jax.lax.optimization_barrier((sent, made(i + 1)))
        parts = jnp.split(sent, np.cumsum(heads)[:-1], axis=3)
        into = [update(y, part, starts[i], axis=2) for y, part in zip(into, parts, strict=True)]
    return tuple(exchange.all_rows_of_heads(y, t) for y in into)


def to_rows(
    exchange: Exchange, finish: Callable[..., Array], x: Pieces, out: Float[Array, "b own heads h"], chunk: int
) -> Pieces:
    """`finish(x's rows, out's rows of all heads)` of all pieces, in chunks, each a `Slice`.

    `out`: of this device's heads, the rows that it attends for (`Exchange.own_queries`).
    """
    if exchange.size == 1:
        return (map_chunks(finish, (x[0], out), chunk, in_place=True),)
    starts = np.cumsum([0, *(piece.shape[1] for piece in x)])
    rows = starts[-1]
    out = jnp.pad(out, [(0, 0), (0, exchange.heads * rows - out.shape[1]), (0, 0), (0, 0)])
    out = jnp.moveaxis(out.reshape(out.shape[0], exchange.heads, rows, *out.shape[2:]), 1, 0)

    def given(i: int) -> Array:
        return exchange.contiguous(out[:, :, starts[i] : starts[i + 1]])

    finished, arrived = [], exchange.swap(given(0))
    for i, piece in enumerate(x):
        following = None
        if i + 1 < len(x):  # what is next is sent once this is there, and taken once this piece is finished
            following, arrived = jax.lax.optimization_barrier((given(i + 1), arrived))
            following = exchange.swap(following)
        result = map_chunks(finish, (piece, exchange.joined(arrived)), chunk, in_place=True)
        if following is not None:
            arrived, result = jax.lax.optimization_barrier((following, result))
        finished.append(result)
    return tuple(finished)
