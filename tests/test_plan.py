"""What a plan means, in hand-written pictures of tiles, and the rules for entries that do not count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plans import int32, random_plan

from pallas_kernels import KEY_TILE, QUERY_TILE, SparsePlan, rule
from pallas_kernels.plan_builders import a_shape_plan, block_sparse_plan, slashes_to_bands, vertical_slash_plan
from pallas_kernels.plan_check import lists_are_clean

BANDS = jax.jit(slashes_to_bands, static_argnames=("max_distance", "width"))
VERTICAL_SLASH = jax.jit(vertical_slash_plan, static_argnames="kv_len")


def tile_picture(plan: SparsePlan, q_len: int, kv_len: int, q_offset: int = 0) -> list[str]:
    """A row a query tile, a character a 64-key tile: '1' all visited, '/' its causal part, '.' none, 'c' columns."""
    mask = np.asarray(plan.to_mask(q_len, kv_len, q_offset=q_offset))[0, 0]
    rows = []
    for i in range(q_len // QUERY_TILE):
        row = ""
        for j in range(kv_len // KEY_TILE):
            cell = mask[i * QUERY_TILE : (i + 1) * QUERY_TILE, j * KEY_TILE : (j + 1) * KEY_TILE]
            position = q_offset + i * QUERY_TILE + np.arange(QUERY_TILE)
            causal = position[:, None] >= j * KEY_TILE + np.arange(KEY_TILE)
            if not cell.any():
                row += "."
            elif (cell == causal).all():
                row += "1" if causal.all() else "/"
            else:
                row += "c"
        rows.append(row)
    return rows


def one_head(**parts) -> SparsePlan:
    arrays = {}
    for name, count in (("columns", "column_count"), ("bands", "band_count"), ("blocks", "block_count")):
        if name in parts:
            arrays[name] = int32(parts[name])[None, None]
            arrays[count] = jnp.full(arrays[name].shape[:-1], arrays[name].shape[-1], jnp.int32)
    return SparsePlan(**arrays)


PROMISES = [  # columns, bands, blocks of query tiles 0 and 1, whether that is clean
    ([0, 3, 999], [64, 192], [[], [0]], True),
    ([5], [70, 134], [[], []], True),
    ([3, 0], [], [[], []], False),
    ([5, 5], [], [[], []], False),
    ([-1, 5], [], [[], []], False),
    ([], [64, 127], [[], []], False),
    ([], [0, 64], [[], []], False),
    ([], [], [[9], [0, 1, 99]], True),
    ([], [], [[], [1, 0]], False),
    ([], [64], [[], [0, 1]], False),  # block 1 of query tile 1 is the band
    ([], [65], [[], [0]], False),  # in a head with blocks bands are whole tiles
]


def test_broken_promises_are_found():
    def padded(lists, width):
        return int32([[*entries, *[7] * (width - len(entries))] for entries in lists]), int32([len(x) for x in lists])

    columns, bands, blocks, clean = zip(*PROMISES, strict=True)
    parts = [*padded(columns, 3), *padded(bands, 2), *padded([row for rows in blocks for row in rows], 3)]
    heads = len(PROMISES)
    parts[4:] = parts[4].reshape(heads, 2, 3), parts[5].reshape(heads, 2)
    plan = SparsePlan(*(x[None] for x in parts))
    np.testing.assert_array_equal(lists_are_clean(plan)[0], clean)
    assert lists_are_clean(SparsePlan()).all()


def test_diagonal_is_always_visited():
    assert tile_picture(SparsePlan(), 384, 384) == [
        "//....",
        "..//..",
        "....//",
    ]


def test_bands_keep_their_distance_from_the_query_tile():
    assert tile_picture(one_head(bands=[64, 256]), 512, 512) == [
        "//......",
        ".1//....",
        "1..1//..",
        "..1..1//",
    ]


def test_blocks_belong_to_one_query_tile():
    assert tile_picture(one_head(blocks=[[-1, -1], [0, 1], [2, 5], [0, 7]]), 512, 512) == [
        "//......",
        "11//....",
        "..1.//..",
        "1.....//",
    ]


def test_columns_are_single_keys_for_every_later_query():
    mask = np.asarray(one_head(columns=[0, 70]).to_mask(256, 256))[0, 0]
    assert mask[255].nonzero()[0].tolist() == [0, 70, *range(128, 256)]
    assert mask[130].nonzero()[0].tolist() == [0, 70, *range(128, 131)]
    assert mask[69].nonzero()[0].tolist() == list(range(70))


def test_q_offset_moves_the_queries_and_not_the_keys():
    plan = one_head(bands=[64, 256])
    assert tile_picture(plan, 256, 512, q_offset=256) == tile_picture(plan, 512, 512)[2:]


def test_a_shape_is_a_sink_and_a_window():
    mask = np.asarray(a_shape_plan(1, 1, sink=3, window=65).to_mask(384, 384))[0, 0]
    # Row 300 lies in the query tile at 256; its window of 65 keys reaches back to 236, rounded out to a tile at 192.
    assert mask[300].nonzero()[0].tolist() == [0, 1, 2, *range(192, 301)]
    for row in range(384):
        assert mask[row, max(0, row - 64) : row + 1].all()


def test_bands_need_not_lie_on_the_tiles_of_keys():
    mask = np.asarray(one_head(bands=[100]).to_mask(256, 256))[0, 0]
    assert mask[200].nonzero()[0].tolist() == [*range(28, 92), *range(128, 201)]


def test_a_band_is_cut_at_the_first_key():
    mask = np.asarray(one_head(bands=[150]).to_mask(256, 256))[0, 0]
    assert mask[128].nonzero()[0].tolist() == [*range(42), 128]  # keys 128 - 150 + 64 and on are not in it


def test_slash_lines_are_covered_and_one_line_costs_two_tiles():
    for distance in (0, 1, 63, 64, 65, 127, 128, 200, 639):
        plan = VERTICAL_SLASH(int32([[[]]]), int32([[[distance]]]), kv_len=640)
        mask = np.asarray(plan.to_mask(640, 640))[0, 0]
        rows = np.arange(distance, 640)
        assert mask[rows, rows - distance].all()
        assert int(plan.band_count[0, 0]) <= 2


@pytest.mark.parametrize(
    "lines, bands",
    [
        ([128, 128, -1, 9999], [64, 128]),  # distances 1 ... 128: what a line shows before the diagonal
        ([200], [136, 200]),  # 73 ... 200
        (range(127, 254), [64, 128, 192, 256]),  # 127 neighbours: 1 ... 253, four tiles and no fifth
        ([200, 260], [136, 200, 264]),  # overlapping lines share tiles
        ([200, 390], [136, 200, 264, 328, 392]),  # a gap of 62 keys is less than a tile: one run
        ([200, 400], [136, 200, 336, 400]),  # a gap of 72 is left out
        ([], []),
    ],
)
def test_bands_of_slash_lines(lines, bands):
    found, count = BANDS(int32([[[*lines]]]), max_distance=639)
    assert found[0, 0, : int(count[0, 0])].tolist() == bands


def test_bands_of_random_lines_cover_each_and_keep_the_nearest(rng):
    lines = int32(rng.integers(0, 1500, (1, 8, 9)))
    bands, count = BANDS(lines, jnp.full((1, 8), 7, jnp.int32), max_distance=1299)
    fewer, fewer_count = BANDS(lines, jnp.full((1, 8), 7, jnp.int32), max_distance=1299, width=3)
    for head in range(8):
        listed = np.asarray(bands[0, head, : int(count[0, head])])
        covered = {key for r in listed for key in range(r - 63, r + 1)}
        wanted = {x for d in np.asarray(lines[0, head, :7]) if d < 1300 for x in range(max(d - 127, 1), d + 1)}
        assert wanted <= covered and (np.diff(listed) >= KEY_TILE).all()
        np.testing.assert_array_equal(fewer[0, head, : int(fewer_count[0, head])], listed[:3])


def test_block_sparse_plan_sorts_and_drops_minus_one():
    plan = block_sparse_plan(int32([[[[3, -1, 0]]]]))
    assert plan.block_count is not None and plan.blocks is not None
    assert plan.block_count.tolist() == [[[2]]] and plan.blocks[0, 0, 0, :2].tolist() == [0, 3]


@pytest.mark.parametrize(
    "bad, good",
    [
        ({"columns": [-3, 5, 5, 900]}, {"columns": [5]}),
        ({"bands": [-64, 0, 64, 64, 100, 6400]}, {"bands": [64]}),
        ({"bands": [63, 70, 133, 134, 200]}, {"bands": [70, 200]}),  # less than a tile after the one before
        ({"bands": [70, 128], "blocks": [[0]] * 3}, {"bands": [128], "blocks": [[0]] * 3}),
        ({"blocks": [[-1, 0, 0, 3, 99]] * 3}, {"blocks": [[0, -1], [0, 3], [0, 3]]}),
    ],
)
def test_entries_that_do_not_count(bad, good):
    mask = one_head(**bad).to_mask(384, 384)
    np.testing.assert_array_equal(mask, one_head(**good).to_mask(384, 384))


def test_a_promised_multiple_is_kept():
    plan = dataclasses.replace(one_head(bands=[70, 128]), band_multiple=64)
    np.testing.assert_array_equal(plan.to_mask(384, 384), one_head(bands=[128]).to_mask(384, 384))


def test_entries_past_the_count_are_ignored():
    plan = SparsePlan(bands=int32([[[64, 128]]]), band_count=int32([[1]]))
    np.testing.assert_array_equal(plan.to_mask(384, 384), one_head(bands=[64]).to_mask(384, 384))


@pytest.mark.parametrize("kind", ["random", "lists"])
@pytest.mark.parametrize("q_len, kv_len, q_offset, lengths", [(300, 300, 0, [300, 77]), (130, 517, 384, [500, 0])])
def test_density_counts_the_mask(rng, q_len, kv_len, q_offset, lengths, kind):
    plan = random_plan(rng, 2, 3, q_len, kv_len)
    if kind == "lists":
        blocks = int32(np.sort(rng.permuted(np.tile(np.arange(9), (2, 3, -(-q_len // 128), 1)), axis=-1)[..., :5]))
        plan = SparsePlan(blocks=blocks, block_count=int32(rng.integers(0, 6, blocks.shape[:-1])), clean=True)
    mask = np.asarray(plan.to_mask(q_len, kv_len, q_offset=q_offset, lengths=int32(lengths)))
    rows = q_offset + np.arange(q_len)
    causal = np.array([sum(r + 1 for r in rows if r < length) for length in lengths])
    wanted = mask.sum((-2, -1)) / np.maximum(causal, 1)[:, None]
    density = plan.density(q_len, kv_len, q_offset=q_offset, lengths=int32(lengths))
    np.testing.assert_allclose(density, wanted, rtol=1e-6)


def test_a_plan_is_a_pytree_and_works_under_jit():
    plan = one_head(bands=[64], columns=[0])
    mask = jax.jit(lambda plan, offset: plan.to_mask(128, 384, q_offset=offset))(plan, int32(256))
    np.testing.assert_array_equal(mask, plan.to_mask(384, 384)[:, :, 256:])


def test_wrong_shapes_name_the_part():
    plan = SparsePlan(bands=int32([[[64]]]), band_count=int32([[1, 1]]))
    with pytest.raises(ValueError, match=r"plan\.band_count has shape \(1, 2\); expected \(1, 1\)"):
        plan.to_mask(128, 128)
    with pytest.raises(ValueError, match=r"plan\.bands and plan\.band_count must be given together"):
        SparsePlan(bands=int32([[[64]]])).to_mask(128, 128)


def test_blocks_in_order_are_counted_as_all_of_them_are(rng):
    past = jax.jit(lambda *x: rule.past_blocks(*x, clean=True).sum(-1))
    for width in (1, 2, 3, 4, 7, 8, 33, 64, 100):
        blocks = np.sort(np.stack([rng.permutation(width + 9)[:width] for _ in range(40)]).reshape(2, 20, width))
        count = int32(rng.integers(0, width + 3, (2, 20)))  # a count past the list is one of all of it
        q0 = int32(QUERY_TILE * rng.integers(0, (width + 11) // 2, 20))
        expected = past(int32(blocks), count, q0[:, None])
        np.testing.assert_array_equal(jax.jit(rule.past_in_order)(int32(blocks), count, q0), expected)
