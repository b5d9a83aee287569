"""Pattern configuration: checks, hashing, and the arrays that ride through a scan over layers."""

import jax
import numpy as np
import pytest

from minference_jax.patterns import (
    A_SHAPE,
    BLOCK_SPARSE,
    DENSE,
    VERTICAL_SLASH,
    AShape,
    BlockSparse,
    Dense,
    HeadPatterns,
    VerticalSlash,
    head_arrays,
)

MIXED = HeadPatterns(((Dense(), VerticalSlash(10, 20)), (AShape(3, 64), BlockSparse(5))))


def test_arrays_carry_kinds_and_budgets():
    arrays = MIXED.arrays()
    np.testing.assert_array_equal(arrays.kind, [[DENSE, VERTICAL_SLASH], [A_SHAPE, BLOCK_SPARSE]])
    np.testing.assert_array_equal(arrays.first, [[0, 10], [3, 5]])
    np.testing.assert_array_equal(arrays.second, [[0, 20], [64, 0]])
    limits = arrays.limits
    assert (limits.sink, limits.window, limits.columns, limits.slashes, limits.blocks) == (3, 64, 10, 20, 5)
    assert limits.lines
    assert limits.covers == 20
    _, kinds = jax.lax.scan(lambda carry, layer: (carry, layer.kind), 0, arrays)
    np.testing.assert_array_equal(kinds, arrays.kind)


def test_patterns_are_hashable_and_equal_by_value():
    assert len({VerticalSlash(), VerticalSlash(1000, 6096), AShape(), Dense(), BlockSparse()}) == 4
    assert hash(MIXED) == hash(HeadPatterns(MIXED.layers))
    assert HeadPatterns.uniform(Dense(), 2, 3).num_heads == 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VerticalSlash(columns=-1), ValueError, "columns"),
        (lambda: VerticalSlash(slashes=1.5), TypeError, "slashes"),
        (lambda: VerticalSlash(probes="first"), ValueError, "probes"),
        (lambda: VerticalSlash(coverage=1.5), ValueError, "coverage"),
        (lambda: VerticalSlash(tiles=3, threshold=0.0), ValueError, "threshold"),
        (lambda: VerticalSlash(threshold=0.001), ValueError, "tiles"),
        (lambda: VerticalSlash(probes=12, threshold=0.001), ValueError, "divisor of 128"),
        (lambda: VerticalSlash(probes=True), ValueError, "probes"),
        (lambda: VerticalSlash(probes=8), ValueError, "need a threshold"),
        (lambda: VerticalSlash(probes=8, density=1.5), ValueError, r"density must be in \(0, 1\]"),
        (lambda: VerticalSlash(probes=8, density=0.3, threshold=0.001), ValueError, "takes no threshold"),
        (lambda: VerticalSlash(density=0.3), ValueError, "density needs probes"),
        (lambda: VerticalSlash(probes=8, tiles=3, threshold=0.001), ValueError, "neither tiles"),
        (lambda: AShape(window=0), ValueError, "window"),
        (lambda: BlockSparse(0), ValueError, "blocks"),
        (lambda: HeadPatterns(()), ValueError, "at least one layer"),
        (lambda: HeadPatterns(((Dense(),), (Dense(),) * 2)), ValueError, "layer 1 has 2 heads, layer 0 has 1"),
        (lambda: HeadPatterns((("dense",),)), TypeError, "layer 0, head 0"),
        (lambda: head_arrays([Dense()], 2), ValueError, "1 entries; q has 2 heads"),
        (lambda: head_arrays("dense", 2), TypeError, "must be a pattern"),
        (lambda: head_arrays(MIXED.arrays(), 2), ValueError, "one layer's heads"),
        (lambda: head_arrays(MIXED, 2), TypeError, "one layer's"),
    ],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
