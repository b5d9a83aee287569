"""Pattern configuration: checks, hashing, and the arrays that ride through a scan over layers."""

import jax
import numpy as np
import pytest

from minference_jax.patterns import (
    AShape,
    BlockSparse,
    Dense,
    HeadPatterns,
    PerTile,
    SharedDensity,
    VerticalSlash,
    layer_patterns,
)

MIXED = HeadPatterns(((Dense(), VerticalSlash(10, 20)), (AShape(3, 64), BlockSparse(5))))


def test_arrays_carry_kinds_and_budgets():
    arrays = MIXED.arrays()
    assert arrays.families == ("a-shape", "block-sparse", "dense", "vertical-slash")
    np.testing.assert_array_equal(arrays.kind, [[2, 3], [0, 1]])
    a_shape, block_sparse, _, vertical_slash = arrays.budgets
    np.testing.assert_array_equal(a_shape.sink, [[0, 0], [3, 0]])
    np.testing.assert_array_equal(a_shape.window, [[0, 0], [64, 0]])
    np.testing.assert_array_equal(block_sparse.blocks, [[0, 0], [0, 5]])
    np.testing.assert_array_equal(vertical_slash.columns, [[0, 10], [0, 0]])
    assert (a_shape.sink_width, a_shape.window_width, block_sparse.width) == (3, 64, 5)
    assert vertical_slash.widths == (10, 20, 0, True, False, False, False)
    assert arrays.covers == 20
    _, kinds = jax.lax.scan(lambda carry, layer: (carry, layer.kind), 0, arrays)
    np.testing.assert_array_equal(kinds, arrays.kind)
    assert bool(arrays.layer(0).all_dense()) is False and MIXED.arrays().layer(1).all_dense() is not None
    assert HeadPatterns.uniform(AShape(), 1, 2).arrays().all_dense() is None


def test_the_order_of_heads_is_no_part_of_a_program():
    one, other = (layer_patterns(heads, 2) for heads in ([Dense(), AShape(3, 64)], [AShape(3, 64), Dense()]))
    assert jax.tree.structure(one) == jax.tree.structure(other)


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
        (lambda: VerticalSlash(probes=8), ValueError, "PerTile or SharedDensity"),
        (lambda: VerticalSlash(probes=True), ValueError, "probes"),
        (lambda: PerTile(12, 0.001), ValueError, "divisor of 128"),
        (lambda: PerTile(True, 0.001), TypeError, "every"),
        (lambda: PerTile(8, 1.0), ValueError, r"threshold must be in \(0, 1\)"),
        (lambda: PerTile(8, None), TypeError, "threshold"),
        (lambda: SharedDensity(1.5), ValueError, r"density must be in \(0, 1\]"),
        (lambda: SharedDensity(float("nan")), ValueError, "density"),
        (lambda: SharedDensity(0.3, every=5), ValueError, "divisor of 128"),
        (lambda: SharedDensity(0.3, question=-1), ValueError, "question"),
        (lambda: AShape(window=0), ValueError, "window"),
        (lambda: BlockSparse(0), ValueError, "blocks"),
        (lambda: HeadPatterns(()), ValueError, "at least one layer"),
        (lambda: HeadPatterns(((Dense(),), (Dense(),) * 2)), ValueError, "layer 1 has 2 heads, layer 0 has 1"),
        (lambda: HeadPatterns(((3,),)), TypeError, "layer 0, head 0"),
        (lambda: layer_patterns([Dense()], 2), ValueError, "1 entries; q has 2 heads"),
        (lambda: layer_patterns("star", 2), ValueError, "star"),
        (lambda: layer_patterns(3, 2), TypeError, "must be a pattern"),
        (lambda: layer_patterns(MIXED.arrays(), 2), ValueError, "one layer's heads"),
        (lambda: layer_patterns(MIXED, 2), TypeError, "one layer's"),
    ],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
