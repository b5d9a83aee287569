"""Sizes of the tiles that plans and kernels are made of."""

QUERY_TILE = 128
"""Consecutive queries that share one list of key tiles."""

KEY_TILE = 64
"""Consecutive keys that are selected together."""


def num_query_tiles(q_len: int) -> int:
    """Query tiles that cover `q_len` rows."""
    return -(-q_len // QUERY_TILE)


def num_key_tiles(kv_len: int) -> int:
    """Key tiles that cover `kv_len` keys."""
    return -(-kv_len // KEY_TILE)
