"""Prompts of a wanted length: as much text, or as many pieces, as fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from minference_jax.data.needle import ChatTokenizer

_SENTENCE_END = re.compile(r"(?<!Mr)(?<!Mrs)(?<!Dr)[.?!]\"?(?=\s)|(?=\n\n)")


@lru_cache(maxsize=8)
def text_ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Ids of `text` alone, remembered: it is the haystack of many prompts."""
    return tokenizer.encode(text, add_special_tokens=False)


def fill_text(
    tokenizer: ChatTokenizer, text: str, build: Callable[[str], list[int]], length: int, *, start: float = 0.0
) -> list[int]:
    """`build(haystack)` of exactly `length` tokens, where `haystack` is a piece of `text`.

    The piece begins at a sentence near the share `start` of the text, and the text begins anew where it ends. What is
    too much is cut off the haystack's end token by token: merges across the seams make its size uncertain by a few.

    Raises `ValueError` when the prompt is longer than `length` without any haystack.
    """
    ids = text_ids(tokenizer, text)
    empty = build("")
    size = length - len(empty)
    if size < 0 or not ids:
        raise ValueError(f"length {length} is too short: the prompt has {len(empty)} tokens without its text")
    first = int(start * len(ids)) % len(ids)

    def piece(size: int) -> str:
        taken = ids[first : first + size]
        while len(taken) < size:
            taken = taken + ids[: size - len(taken)]
        # The cuts may be inside a character.
        found = tokenizer.decode(taken).replace("\ufffd", "")
        end = _SENTENCE_END.search(found[:2000]) if first else None
        return found[end.end() :].lstrip() if end and end.end() < len(found) / 2 else found

    filled = build(piece(size))
    for _ in range(8):
        if len(filled) >= length:
            break
        size += length - len(filled)
        filled = build(piece(size))
    surplus = len(filled) - length
    if surplus <= 0:
        return filled
    # What follows the haystack ends the prompt without a haystack too.
    backwards = zip(reversed(filled), reversed(empty), strict=False)
    after = next((i for i, (here, there) in enumerate(backwards) if here != there), len(empty))
    end = len(filled) - after
    return filled[: end - surplus] + filled[end:]


def fill_pieces(build: Callable[[int], list[int]], length: int, *, least: int, most: int) -> list[int]:
    """`build(pieces)` with the largest number of pieces, from `least` to `most`, that `length` tokens hold.

    The number of tokens must not fall with that of pieces; it is taken for nearly proportional, so that few builds are
    needed. Raises `ValueError` when even `least` pieces are too many.
    """
    best = build(least)
    if len(best) > length:
        raise ValueError(f"length {length} is too short: {least} pieces have {len(best)} tokens")
    low, high, low_size, high_size, least_size = least, most + 1, len(best), 0, len(best)
    trial = low + max(1, (length - low_size) * low // max(2 * low_size, 1))
    while high - low > 1:
        trial = min(max(trial, low + 1), high - 1)
        ids = build(trial)
        if len(ids) <= length:
            low, low_size, best = trial, len(ids), ids
        else:
            high, high_size = trial, len(ids)
        if high_size:  # between two sizes
            trial = low + int((length - low_size) * (high - low) / max(high_size - low_size, 1))
        else:
            trial = low + max(1, int((length - low_size) * (low - least + 1) / max(low_size - least_size, 1)))
    return best


def insert_between_sentences(text: str, sentences: list[str], depths: list[float]) -> str:
    """`text` with each of `sentences` put between two of its sentences, at shares `depths` of its length."""
    gaps = [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    if 0.0 in depths:
        gaps = [0, *gaps]
    places = sorted((min(gaps, key=lambda gap: abs(gap - depth * len(text))), i) for i, depth in enumerate(depths))
    parts, done = [], 0
    for place, i in places:
        parts += [text[done:place].strip(" "), sentences[i]]
        done = place
    return " ".join(part for part in (*parts, text[done:].lstrip(" ")) if part)
