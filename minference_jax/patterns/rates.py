"""How fast attention is on each kind of GPU, and what one layer of dense and of sparse attention takes by that.

With n heads of h, t query rows and pairs(…) visible (query, key) cells of a head:

- dense: launch + 4 · n · h · pairs(all) / dense rate.
- sparse: launch + index + 4 · n · h · visited / sparse rate.

What a pattern visits and what its index takes, each says of itself (`Pattern.visited`, `Pattern.index_seconds`).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from minference_jax.patterns.base import pairs


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of one device, bfloat16, head_dim 128: operations a second, seconds.

    - `dense`, `sparse`: 4 · h operations for each visited cell, a second, of long prompts. `wide`: the same of either
      with a head_dim above 128, for which there is one kernel (None: as for others).
    - `launch`: seconds that either attention takes beside that. `index`: seconds of an index of no keys;
      `index_key`: for each key, of 32 query heads.
    - `probe`: visited cells of head_dim 128 that take as long as one score of a probe every few rows, which is stored
      and read again whatever the head_dim.
    - `mass`: visited cells that take as long as one score of a probe whose tile masses alone are kept. `selection`:
      seconds of choosing tiles by their masses, beside that.
    - `source`: where the numbers are from, for people.
    """

    dense: float
    sparse: float
    wide: float | None
    launch: float
    index: float
    index_key: float
    probe: float
    mass: float
    selection: float
    source: str


WARP_LEVEL, WIDE = 363e12, 271e12
"""What the warp-level kernel does on an H200 in the form that GPUs before it have, with head_dim 128 and 256."""

HOPPER = Rates(
    dense=600e12,
    sparse=570e12,
    wide=284e12,
    launch=0.05e-3,
    index=0.5e-3,
    index_key=1.3e-8,
    probe=9.0,
    mass=0.7,
    selection=0.1e-3,
    source="measured",
)
"""Measured on an H100 and an H200, which has an H100's arithmetic: what both are bound by."""

PEAK, BANDWIDTH = 989e12, 3.35e12
"""An H100's data sheet: 16-bit operations with float32 sums, without sparsity, and bytes, a second."""


def estimated(peak: float, bandwidth: float) -> Rates:
    """Rates by a data sheet: of the peak, each kernel reaches the share that it reaches on an H200.

    The warp-level kernel uses instructions that are no faster on any later GPU than there, whatever the peak. What an
    index stores and reads again takes bandwidth. Tile masses and their choice are jnp, which stores each score.
    """
    sparse = min(peak * WARP_LEVEL / PEAK, WARP_LEVEL)
    slower = BANDWIDTH / bandwidth
    probe = HOPPER.probe * slower * sparse / HOPPER.sparse
    return Rates(
        dense=peak * HOPPER.dense / PEAK,
        sparse=sparse,
        wide=sparse * WIDE / WARP_LEVEL,
        launch=HOPPER.launch,
        index=HOPPER.index,
        index_key=HOPPER.index_key * slower,
        probe=probe,
        mass=probe,
        selection=HOPPER.index,
        source="estimated from its data sheet",
    )


RATES = {
    "H100": HOPPER,
    "H200": HOPPER,
    "A100": estimated(312e12, 2.04e12),
    "A10": estimated(125e12, 0.6e12),
    "L40S": estimated(362e12, 0.864e12),
    "RTX 4090": estimated(165e12, 1.01e12),
    "RTX 5090": estimated(209e12, 1.79e12),
    "B200": estimated(2250e12, 8e12),
}
"""By a part of the device's name that no digit follows."""

MARGIN = 1.05
"""How much slower than sparse attention dense attention may be predicted to be and still be chosen: it is exact."""

OTHER = Rates(
    dense=1.0e12,
    sparse=0.5e12,
    wide=None,
    launch=0.0,
    index=2e-3,
    index_key=1e-7,
    probe=0.5,
    mass=0.5,
    selection=2e-3,
    source="no GPU",
)
"""Where our attention is plain jnp: it has to visit half the cells or fewer to pay."""

UNKNOWN = Rates(
    dense=100e12,
    sparse=MARGIN * 10e12,
    wide=None,
    launch=0.0,
    index=0.0,
    index_key=0.0,
    probe=0.0,
    mass=0.0,
    selection=0.0,
    source="no rates for this GPU: sparse attention has to visit at most a tenth",
)
"""A GPU that nobody has measured: our kernel may be tuned badly for it."""


def rates_of(device: str) -> Rates:
    """The rates of a device, by its name in JAX."""
    for name, rates in RATES.items():
        if re.search(rf"{name}(?!\d)", device):
            return rates
    return UNKNOWN if "NVIDIA" in device else OTHER


class Predicted(NamedTuple):
    """Milliseconds of one layer's dense and sparse attention, and where the rates are from."""

    dense_ms: float
    sparse_ms: float
    source: str


def predicted(patterns: Iterable[Any], num_heads: int, head_dim: int, rows: int, keys: int, device: str) -> Predicted:
    """What attention of `rows` queries at the end of `keys` keys takes on a device.

    **Arguments:** `patterns`: of each head, in one layer or in several, of which the mean counts. `num_heads`: query
    heads of a layer. `device`: its name in JAX.

    Patterns that are new each time still cost little: heads that share a pattern object are looked at once.
    """
    rates = rates_of(device)
    dense_rate, sparse_rate = rates.dense, rates.sparse
    if head_dim > 128 and rates.wide:
        dense_rate = sparse_rate = rates.wide
    of_head = dataclasses.replace(rates, probe=rates.probe * 128 / head_dim)
    heads = list(patterns)
    number = Counter(map(id, heads))
    distinct = {id(pattern): pattern for pattern in heads}
    visited = sum(number[key] * p.visited(rows, keys, of_head) for key, p in distinct.items()) / len(heads)
    operations = 4 * head_dim * num_heads
    dense = rates.launch + operations * pairs(rows, keys, keys) / dense_rate
    index = max(pattern.index_seconds(keys, num_heads, rates) for pattern in distinct.values())
    sparse = rates.launch + index + operations * visited / sparse_rate
    return Predicted(1e3 * dense, 1e3 * sparse, rates.source)
