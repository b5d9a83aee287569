"""The index rules in plain NumPy, one head and one sequence at a time: what the JAX index is tested against.

Stated from the description of the original (MInference, arXiv 2407.02490, Algorithms 2 and 3, and the constants of
its released code), with the query tile of this package (128 rows). Written for reading, not for speed.
"""

import numpy as np

PROBES, SINK_COLUMNS, WINDOW_DISTANCES = 64, 30, 100
MIN_COLUMNS, MIN_SLASHES = 30, 50
QUERY_TILE, KEY_TILE = 128, 64


def top_k(scores, k):
    """Positions of the k largest scores, ascending; equal scores go to the lower position."""
    return np.sort(np.argsort(-scores, kind="stable")[:k])


def last_probes(length, q_offset, q_len):
    """Positions of the last (up to) 64 valid rows of the queries [q_offset, q_offset + q_len)."""
    end = min(length, q_offset + q_len)
    return np.arange(max(q_offset, end - PROBES), max(end, q_offset))


def spread_probes(length, q_offset, q_len):
    """The last 16 valid rows, and one row from the middle of each of 48 equal parts of those before."""
    rows = last_probes(length, q_offset, q_len)
    valid = max(min(length, q_offset + q_len) - q_offset, 0)
    if valid <= PROBES:
        return rows
    even = [q_offset + (2 * i + 1) * (valid - 16) // 96 for i in range(48)]
    return np.concatenate([even, rows[-16:]])


def softmax_rows(q, k, rows, scale=None):
    """Causal softmax of the query rows at absolute positions `rows` (q is indexed by the caller) over all keys."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.astype(np.float32) @ k.astype(np.float32).T * np.float32(scale)
    scores[np.arange(k.shape[0])[None, :] > rows[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def column_sums(weights):
    return weights.sum(0)


def diagonal_sums(weights, rows):
    """sums[d] = total weight at distance d = row position − key position."""
    sums = np.zeros(weights.shape[1], np.float32)
    for weight, row in zip(weights, rows, strict=True):
        for distance in range(min(row, weights.shape[1] - 1) + 1):
            sums[distance] += weight[row - distance]
    return sums


def official_columns(column_scores, budget, length):
    """Key positions the original picks from its column scores of the `length` visible keys."""
    scores = np.array(column_scores[:length], np.float32)
    scores[:SINK_COLUMNS] = np.inf
    return top_k(scores, min(length, max(budget, MIN_COLUMNS)))


def official_slashes(diagonal_scores, budget, length):
    """Distances the original picks from its diagonal scores."""
    scores = np.array(diagonal_scores[:length], np.float32)
    scores[:WINDOW_DISTANCES] = np.inf
    return top_k(scores, min(length, max(budget, MIN_SLASHES)))


def vertical_slash(q, k, columns, slashes, length, q_offset=0):
    """(key positions, distances) for one head: q [t, h] from position q_offset, k [s, h]."""
    end = min(length, q_offset + q.shape[0])
    rows = last_probes(length, q_offset, q.shape[0])
    weights = softmax_rows(q[rows - q_offset], k[:end], rows)
    return (
        official_columns(column_sums(weights), columns, end),
        official_slashes(diagonal_sums(weights, rows), slashes, end),
    )


def bands_of_lines(distances):
    """Band tiles (beyond the diagonal) that cover the lines: each run of lines, less than a tile apart, end to end."""
    bands, run, last = [], 1, -np.inf
    for distance in sorted(d for d in distances if d > 0):
        near = max(distance - (QUERY_TILE - 1), 1)
        if near - last > KEY_TILE:
            run = near
        while run <= distance:  # the next tile covers the distances run … run + 63
            bands.append(run + KEY_TILE - 1)
            run += KEY_TILE
        last = distance
    return np.array(bands, np.int32)


def captured_share(band, distance):
    """Share of a query tile's rows for which the key at `distance` lies in the tile at distance `band`."""
    keys = np.arange(QUERY_TILE) - distance  # relative to the first row of the query tile
    return np.mean((keys >= -band) & (keys < -band + KEY_TILE))


def pooled(x, tile, length):
    """Mean of each tile's valid rows; zero for a tile without one."""
    tiles = -(-x.shape[0] // tile)
    out = np.zeros((tiles, x.shape[1]), np.float32)
    for i in range(tiles):
        rows = x[i * tile : min((i + 1) * tile, length)]
        if len(rows):
            out[i] = rows.astype(np.float32).mean(0)
    return out


def block_scores(q, k, length, q_offset=0):
    """Pooled query tile · pooled key tile: [query tiles, key tiles]."""
    end = min(length, q_offset + q.shape[0])
    return pooled(q, QUERY_TILE, end - q_offset) @ pooled(k, KEY_TILE, end).T


def block_tiles(scores, budget, q_offset=0):
    """Key tiles before the diagonal that each query tile picks; the diagonal's two count towards the budget."""
    picked = []
    for i, row in enumerate(scores):
        past = (q_offset + i * QUERY_TILE) // KEY_TILE
        row = np.array(row[:past], np.float32)
        row[:1] = np.inf
        picked.append(top_k(row, min(past, max(budget - 2, 1))))
    return picked
