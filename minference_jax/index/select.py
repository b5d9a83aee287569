"""Exact top-k without a sort, in position order, with a static width and a traced k per row.

`jax.lax.top_k` sorts whole rows on GPU (k above a few hundred), returns them by score, and takes one static k. A
kernel wants positions in ascending order, and heads differ in k. So: find the k-th largest score on order-preserving
integers, two bits a pass (each pass counts the scores above three thresholds in one fused reduction), then compact the
chosen positions through a bitmap of one word per 32 scores, so that everything after one last pass over the scores is
32 times smaller.

Equal scores go to the lower position. NaN counts as −inf, and −inf is never chosen: it marks entries out of range.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt, UInt32

from pallas_kernels.tracing import vary_alike

_WORD = 32

DIGIT_BITS = 2
"""Bits of the threshold that one pass over the scores finds. With 3 or 4 there are fewer passes, but each has 7 or 15
sums to compute: on an H100, 1, 3 and 4 are slower."""

_BLOCK = 1024


class Enough(NamedTuple):
    """Fewer than the k best, where those hold enough."""

    mass: Float[Array, "*rows s"]
    """What each entry holds, at least 0; it may differ from the scores."""

    target: Float[Array, "*rows"]
    """The best entries are taken until they hold so much together."""

    least: int = 0
    """The first so many are taken in any case."""


def top_k(
    scores: Float[Array, "*rows s"], k: Int[Array, "*rows"], width: int, enough: Enough | None = None
) -> tuple[Array, Array]:
    """Positions of the k largest scores of each row, ascending; of fewer, where they hold `enough`.

    **Arguments:** `scores`: float32, or a 16-bit float (half the passes). `k`: int32, traced; clamped to [0, width]
    and to the number of scores above −inf. `width`: static number of output slots.

    **Returns:** positions int32 `[*rows, width]` (slots at or past the count hold s) and count int32 `[*rows]`.

    Cost: 18 reads of `scores`, 10 of 16-bit ones (from cache where they fit).
    """
    words = top_k_words(scores, jnp.minimum(k, width), enough)
    return word_positions(words, width, scores.shape[-1])


def top_k_mask(
    scores: Float[Array, "*rows s"], k: Int[Array, "*rows"], enough: Enough | None = None
) -> Bool[Array, "*rows s"]:
    """True at the k largest scores of each row; see `top_k`."""
    return unpack(top_k_words(scores, k, enough), scores.shape[-1])


def top_k_words(
    scores: Float[Array, "*rows s"], k: Int[Array, "*rows"], enough: Enough | None = None
) -> UInt32[Array, "*rows w"]:
    """`top_k_mask` as a bitmap: bit p % 32 of word p // 32 is position p."""
    keys = ordered_keys(scores)
    eligible = jnp.sum(keys > _lowest(scores.dtype), axis=-1, dtype=jnp.int32)
    k = jnp.clip(k.astype(jnp.int32), 0, eligible)
    threshold = kth_largest(keys, k, enough)[..., None]
    above, tied = keys > threshold, keys == threshold
    above_words, tied_words = pack(above), pack(tied)
    taken, ties_before = _set_bits(above_words), _exclusive_sum(jax.lax.population_count(tied_words).astype(jnp.int32))
    wanted = k - taken
    if enough is not None:
        held, more = (jnp.sum(jnp.where(flags, enough.mass, 0), axis=-1) for flags in (above, tied))
        one_tie = jnp.maximum(more / jnp.maximum(_set_bits(tied_words), 1).astype(more.dtype), 1e-30)
        missing = jnp.clip(jnp.ceil((enough.target - held) / one_tie), 0, scores.shape[-1]).astype(jnp.int32)
        wanted = jnp.minimum(wanted, jnp.maximum(missing, enough.least - taken))
    return above_words | lowest_bits(tied_words, jnp.maximum(wanted[..., None] - ties_before, 0))


def ordered_keys(scores: Float[Array, "*rows s"]) -> UInt[Array, "*rows s"]:
    """Unsigned integers of the same size in the order of the scores; NaN maps to the value of −inf, −0 to that of +0.

    Integer operations only: comparing floats would flush denormals to zero on some platforms and not on others.
    """
    unsigned = jnp.dtype(f"uint{8 * scores.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(scores, unsigned)
    sign = jnp.asarray(1 << (8 * unsigned.itemsize - 1), unsigned)
    infinity = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, scores.dtype), unsigned)
    keys = jnp.where(bits > sign, ~bits, bits | sign)
    return jnp.where((bits & ~sign) > infinity, _lowest(scores.dtype), keys)


def _lowest(dtype: jnp.dtype) -> Array:
    """ordered_keys(−inf)."""
    return ~jax.lax.bitcast_convert_type(jnp.asarray(-jnp.inf, dtype), jnp.dtype(f"uint{8 * dtype.itemsize}"))


def kth_largest(
    keys: UInt[Array, "*rows s"], k: Int[Array, "*rows"], enough: Enough | None = None
) -> UInt[Array, "*rows"]:
    """The largest value that at least k keys of each row reach (the type's largest where k is 0), or that `enough`
    of them reach."""
    kind, bits = keys.dtype, 8 * keys.dtype.itemsize
    padding = [(0, 0)] * (keys.ndim - 1) + [(0, -keys.shape[-1] % min(_BLOCK, keys.shape[-1]))]

    def blocks(x: Array) -> Array:
        # Sums within blocks first: one kernel computes those of all thresholds, a second one finishes them.
        return jnp.pad(x, padding).reshape(*x.shape[:-1], -1, min(_BLOCK, x.shape[-1]))

    keys = blocks(keys)
    shares = [jnp.ones((), jnp.int32)] + ([] if enough is None else [blocks(enough.mass)])
    digits = jnp.arange(1, 1 << DIGIT_BITS, dtype=kind)

    def step(i: Int[Array, ""], found: Array) -> Array:
        shift = (bits - DIGIT_BITS * (i + 1)).astype(kind)
        trials = found[..., None] | (digits << shift)
        held = []
        for share in shares:
            sums = (jnp.where(keys >= trials[..., d, None, None], share, 0).sum(-1) for d in range(digits.size))
            held.append(jnp.stack(list(sums), axis=-2).sum(-1))
        reached = held[0] >= k[..., None]
        if enough is not None:
            reached |= (held[1] >= enough.target[..., None]) & (held[0] >= enough.least)
        return found | (jnp.sum(reached, axis=-1, dtype=kind) << shift)

    nothing = vary_alike(jnp.zeros(k.shape, kind), keys, k, () if enough is None else tuple(enough))
    return jax.lax.fori_loop(0, bits // DIGIT_BITS, step, nothing)


def pack(mask: Bool[Array, "*rows s"]) -> UInt32[Array, "*rows w"]:
    """32 flags to a word, lowest position in the lowest bit."""
    mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % _WORD)])
    bits = mask.reshape(*mask.shape[:-1], -1, _WORD).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(_WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def unpack(words: UInt32[Array, "*rows w"], size: int) -> Bool[Array, "*rows size"]:
    """The first `size` flags of a bitmap."""
    bits = (words[..., None] >> jnp.arange(_WORD, dtype=jnp.uint32)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :size].astype(bool)


def word_positions(
    words: UInt32[Array, "*rows w"], width: int, fill: int
) -> tuple[Int[Array, "*rows width"], Int[Array, "*rows"]]:
    """Positions of the first `width` set bits of each row, ascending, and their count; slots past it hold `fill`."""
    totals = jnp.cumsum(jax.lax.population_count(words).astype(jnp.int32), axis=-1)
    rank = jnp.arange(width, dtype=jnp.int32)
    flat = totals.reshape(-1, totals.shape[-1])
    word = jax.vmap(lambda row: jnp.searchsorted(row, rank, side="right", method="scan_unrolled"))(flat)
    word = jnp.minimum(word.astype(jnp.int32), totals.shape[-1] - 1).reshape(*words.shape[:-1], width)
    bits = jnp.take_along_axis(words, word, axis=-1, mode="clip")
    before = jnp.take_along_axis(totals, word, axis=-1, mode="clip") - jax.lax.population_count(bits).astype(jnp.int32)
    position = word * _WORD + nth_bit(bits, rank - before)
    count = jnp.minimum(totals[..., -1], width)
    return jnp.where(rank < count[..., None], position, jnp.int32(fill)), count


def nth_bit(words: UInt32[Array, "*any"], n: Int[Array, "*any"]) -> Int[Array, "*any"]:
    """Index of the set bit of rank n (0 = lowest); 31 or less where there are not that many."""
    index = jnp.zeros(words.shape, jnp.int32)
    for half in (16, 8, 4, 2, 1):
        low = words & jnp.uint32((1 << half) - 1)
        inside = jax.lax.population_count(low).astype(jnp.int32)
        skip = n >= inside
        index = jnp.where(skip, index + half, index)
        n = jnp.where(skip, n - inside, n)
        words = jnp.where(skip, words >> half, low)
    return index


def lowest_bits(words: UInt32[Array, "*any"], n: Int[Array, "*any"]) -> UInt32[Array, "*any"]:
    """The n lowest set bits of each word (all of them where there are no more than n)."""
    below = (jnp.uint32(1) << nth_bit(words, n).astype(jnp.uint32)) - 1
    enough = n >= jax.lax.population_count(words).astype(jnp.int32)
    return jnp.where(enough, words, words & below)


def _set_bits(words: UInt32[Array, "*rows w"]) -> Int[Array, "*rows"]:
    return jnp.sum(jax.lax.population_count(words), axis=-1).astype(jnp.int32)


def _exclusive_sum(x: Int[Array, "*rows w"]) -> Int[Array, "*rows w"]:
    return jnp.cumsum(x, axis=-1) - x
