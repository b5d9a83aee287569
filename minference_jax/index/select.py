"""Exact top-k without a sort, in position order, with a static width and a traced k per row.

`jax.lax.top_k` sorts whole rows on GPU (k above a few hundred), returns them by score, and takes one static k. A
kernel wants positions in ascending order, and heads differ in k. So: find the k-th largest score by bisection on
order-preserving integers (32 counting passes, each one fused reduction), then compact the chosen positions through a
bitmap of one word per 32 scores, so that everything after one last pass over the scores is 32 times smaller.

Equal scores go to the lower position. NaN counts as −inf, and −inf is never chosen: it marks entries out of range.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

_WORD = 32


def top_k(scores: Float[Array, "*rows s"], k: Int[Array, "*rows"], width: int) -> tuple[Array, Array]:
    """Positions of the k largest scores of each row, ascending.

    **Arguments:** `scores`: float32. `k`: int32, traced; clamped to [0, width] and to the number of scores above
    −inf. `width`: static number of output slots.

    **Returns:** positions int32 `[*rows, width]` (slots at or past the count hold s) and count int32 `[*rows]`.

    Cost: 33 reads of `scores` (from cache where they fit).
    """
    words = top_k_words(scores, jnp.minimum(k, width))
    return word_positions(words, width, scores.shape[-1])


def top_k_mask(scores: Float[Array, "*rows s"], k: Int[Array, "*rows"]) -> Bool[Array, "*rows s"]:
    """True at the k largest scores of each row; see `top_k`."""
    return unpack(top_k_words(scores, k), scores.shape[-1])


def top_k_words(scores: Float[Array, "*rows s"], k: Int[Array, "*rows"]) -> UInt32[Array, "*rows w"]:
    """`top_k_mask` as a bitmap: bit p % 32 of word p // 32 is position p."""
    keys = ordered_keys(scores)
    eligible = jnp.sum(keys > _LOWEST, axis=-1, dtype=jnp.int32)
    k = jnp.clip(k.astype(jnp.int32), 0, eligible)
    threshold = kth_largest(keys, k)
    above, ties = pack(keys > threshold[..., None]), pack(keys == threshold[..., None])
    wanted = k - jnp.sum(jax.lax.population_count(above), axis=-1).astype(jnp.int32)
    ties_before = _exclusive_sum(jax.lax.population_count(ties).astype(jnp.int32))
    return above | lowest_bits(ties, jnp.maximum(wanted[..., None] - ties_before, 0))


def compact(mask: Bool[Array, "*rows s"], width: int) -> tuple[Int[Array, "*rows width"], Int[Array, "*rows"]]:
    """Positions of the first `width` set flags of each row, ascending, and their count; slots past it hold s."""
    return word_positions(pack(mask), width, mask.shape[-1])


def ordered_keys(scores: Float[Array, "*rows s"]) -> UInt32[Array, "*rows s"]:
    """uint32 in the order of the float32 scores; NaN maps to the value of −inf, −0 to that of +0.

    Integer operations only: comparing floats would flush denormals to zero on some platforms and not on others.
    """
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    is_nan = (bits & ~sign) > jnp.uint32(0x7F800000)
    keys = jnp.where(bits > sign, ~bits, bits | sign)
    return jnp.where(is_nan, jnp.uint32(_LOWEST), keys)


_LOWEST = 0x007FFFFF  # ordered_keys(-inf)


def kth_largest(keys: UInt32[Array, "*rows s"], k: Int[Array, "*rows"]) -> UInt32[Array, "*rows"]:
    """The largest value that at least k keys of each row reach (uint32's largest where k is 0)."""

    def step(i: Int[Array, ""], found: UInt32[Array, "*rows"]) -> UInt32[Array, "*rows"]:
        trial = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.sum(keys >= trial[..., None], axis=-1, dtype=jnp.int32)
        return jnp.where(reached >= k, trial, found)

    return jax.lax.fori_loop(0, 32, step, jnp.zeros(k.shape, jnp.uint32))


def count_reaching(
    scores: Float[Array, "*rows s"], mass: Float[Array, "*rows s"], target: Float[Array, "*rows"]
) -> Int[Array, "*rows"]:
    """How many of the best-scored entries hold `target` mass together (all of them, if they never do).

    `mass` >= 0 may differ from `scores` (an entry with score +inf is taken first, whatever its mass).
    """
    keys = ordered_keys(scores)

    def held(at_least: UInt32[Array, "*rows"]) -> Float[Array, "*rows"]:
        return jnp.sum(jnp.where(keys >= at_least[..., None], mass, 0), axis=-1)

    def step(i: Int[Array, ""], found: UInt32[Array, "*rows"]) -> UInt32[Array, "*rows"]:
        trial = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(held(trial) >= target, trial, found)

    threshold = jax.lax.fori_loop(0, 32, step, jnp.zeros(target.shape, jnp.uint32))
    above = keys > threshold[..., None]
    ties = jnp.sum(keys == threshold[..., None], axis=-1, dtype=jnp.int32)
    held_above = jnp.sum(jnp.where(above, mass, 0), axis=-1)
    one_tie = jnp.maximum((held(threshold) - held_above) / jnp.maximum(ties, 1).astype(mass.dtype), 1e-30)
    wanted = jnp.ceil((target - held_above) / one_tie)
    return jnp.sum(above, axis=-1, dtype=jnp.int32) + jnp.minimum(jnp.maximum(wanted, 0).astype(jnp.int32), ties)


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


def _exclusive_sum(x: Int[Array, "*rows w"]) -> Int[Array, "*rows w"]:
    return jnp.cumsum(x, axis=-1) - x
