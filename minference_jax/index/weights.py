"""The softmax of probe rows over the keys, and its sums: by key, and by distance before the probe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.index.probe_sums import row_totals, unsupported_reason, weight_sums
from pallas_kernels.tracing import on_gpus


@dataclasses.dataclass(frozen=True)
class Weights:
    """The probes' softmax weights, not computed yet: each method computes them anew, for one reader.

    An array of float32 weights would take twice the memory of the scores, and a compiler stores it if it sees many
    readers. So every reader stands behind a barrier of its own, and fuses its own exponentials. On GPUs the sums
    come from kernels, which differ from that in rounding.
    """

    shape: tuple[int, ...]
    """`[*heads, p, s]`. What follows has all rows as one axis: with several axes, one of them of size 1, XLA prefers a
    layout that makes it copy all scores to transpose them."""

    scores: Float[Array, "rows s"]
    factor: float
    positions: Int[Array, "rows 1"]

    shift: Float[Array, "rows 1"]
    """The weight of a key is exp(score · factor − shift); inf where there are none."""

    def by_key(self) -> Float[Array, "*heads p s"]:
        """Weight of the key at each position."""
        seen = jnp.arange(self.shape[-1], dtype=jnp.int32) <= self.positions
        scores = jax.lax.optimization_barrier(self.scores)
        return jnp.exp(_scaled(scores, self.factor, seen) - self.shift).reshape(self.shape)

    def sum_by_key(self) -> Float[Array, "*heads s"]:
        """`by_key`, summed over the probes."""
        return self._summed(lambda weights: weights.by_key().sum(-2), skip=None)

    def sum_by_distance(self, skip: int, keep: Bool[Array, "*heads s"] | None = None) -> Float[Array, "*heads s"]:
        """Weight of the key at each distance before the probe, summed over the probes, without the keys below the
        position `skip` (static), and those where `keep` is False if that is given."""

        def plain(weights: Weights) -> Array:
            return weights._by_distance(skip, keep).sum(-2)

        return self._summed(plain, skip) if keep is None else plain(self)

    def _by_distance(self, skip: int, keep: Array | None) -> Float[Array, "*heads p s"]:
        # The shift is a gather of the scores, which fuses with all the rest. (Padding and reshaping, which shears the
        # rows of consecutive probes, takes a GPU five times as long.)
        p, s = self.shape[-2:]
        key = self.positions - jnp.arange(s, dtype=jnp.int32)
        at = jnp.clip(key, 0, s - 1)
        shifted = jnp.take_along_axis(jax.lax.optimization_barrier(self.scores), at, axis=-1, mode="clip")
        seen = (key >= skip) & (key < s)
        if keep is not None:
            head = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None] // p
            seen &= keep.reshape(-1, s).at[head, at].get(mode="promise_in_bounds")
        return jnp.exp(_scaled(shifted, self.factor, seen) - self.shift).reshape(self.shape)

    def _summed(self, plain: Callable[[Weights], Array], skip: int | None) -> Array:
        *heads, p, s = self.shape

        def of_arrays(scores: Array, positions: Array, shift: Array) -> Array:
            return plain(dataclasses.replace(self, scores=scores, positions=positions, shift=shift))

        def kernel(scores: Array, positions: Array, shift: Array) -> Array:
            by_head = scores.reshape(-1, p, s), positions.reshape(-1, p), shift.reshape(-1, p)
            return weight_sums(*by_head, self.factor, skip=skip).reshape(*heads, s)

        return _either(kernel, of_arrays, self.factor, self.scores, self.positions, self.shift)


def probe_weights(
    scores: Float[Array, "*heads p s"], factor: float, positions: Int[Array, "*heads p"]
) -> Float[Array, "*heads p s"]:
    """Causal softmax over the keys in float32; all zero for a probe at a negative position."""
    return lazy_weights(scores, factor, positions).by_key()


def lazy_weights(
    scores: Float[Array, "*heads p s"],
    factor: float,
    positions: Int[Array, "*heads p"],
    importance: Float[Array, "*heads p"] | None = None,
) -> Weights:
    """The softmax of the probes' scores times `factor`, each probe at its position, times the probe's importance."""
    shape = scores.shape
    scores, positions = scores.reshape(-1, shape[-1]), positions.reshape(-1, 1)

    def plain(scores: Array, positions: Array) -> tuple[Array, Array]:
        seen = jnp.arange(shape[-1], dtype=jnp.int32) <= positions
        top = jnp.max(_scaled(scores, factor, seen), axis=-1, keepdims=True)
        top = jnp.where(jnp.isfinite(top), top, 0)
        again = _scaled(jax.lax.optimization_barrier(scores), factor, seen)
        return top, jnp.sum(jnp.exp(again - top), axis=-1, keepdims=True)

    def kernel(scores: Array, positions: Array) -> tuple[Array, Array]:
        top, total = row_totals(scores, positions[:, 0], factor)
        return top[:, None], total[:, None]

    top, total = _either(kernel, plain, factor, scores, positions)
    share = jnp.where(total > 0, 1 / total, 0)
    if importance is not None:
        share = share * importance.reshape(-1, 1)
    # Taken into the exponent: the same exponentials as in `total` would become one array, which XLA may store.
    return Weights(shape, scores, factor, positions, top - jnp.log(share))


def _either(
    kernel: Callable[..., Any], plain: Callable[..., Any], factor: float, scores: Float[Array, "rows s"], *others: Array
) -> Any:
    """One of two functions of the scores and others: the kernel on GPUs. Derivatives are those of the plain form."""
    run = plain if unsupported_reason(scores, factor) is not None else on_gpus(kernel, plain)
    return run(scores, *others)


def _scaled(scores: Float[Array, "rows s"], factor: float, seen: Bool[Array, "rows s"]) -> Float[Array, "rows s"]:
    return jnp.where(seen, scores.astype(jnp.float32) * jnp.float32(factor), -jnp.inf)


def masked_softmax(scores: Float[Array, "*rows x"], seen: Bool[Array, "*#rows x"]) -> Float[Array, "*rows x"]:
    """Softmax over the seen entries of each row; zero in a row without one."""
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
