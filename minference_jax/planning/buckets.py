"""Few static lengths instead of many: what keeps a new prompt length from compiling a new program."""

from __future__ import annotations

QUERY_TILE = 128


def bucket_length(length: int) -> int:
    """The smallest bucket that holds `length` tokens: 128, 256, …, 1024, 1280, 1536, 1792, 2048, 2560, …

    Buckets are multiples of 128 (one query tile), four to an octave: padding adds at most a quarter of the length
    from 512 tokens on, and all prompts up to a million tokens need 48 of them.
    """
    if length <= 0:
        raise ValueError(f"length must be positive, got {length}")
    step = max(QUERY_TILE, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step
