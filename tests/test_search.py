"""Pattern search: its parts on small cases written by hand, and the whole of it on a tiny model, interrupted too."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_llama import random_llama

import pallas_kernels
from minference_jax import AShape, BlockSparse, Dense, HeadPatterns, Llama, LlamaConfig, VerticalSlash, load_patterns
from minference_jax.attention import make_plan
from minference_jax.index.recall import recall
from minference_jax.models.capture import capture_qkv
from minference_jax.patterns import PerTile, SharedDensity, layer_patterns
from minference_jax.patterns.files import load_about
from minference_jax.search import Latency, Settings, search_patterns, search_to_file
from minference_jax.search.adjust import adjust
from minference_jax.search.candidates import arrays, default_candidates
from minference_jax.search.choose import allocate, best_at_equal_cost
from minference_jax.search.cost import CostModel, default_target
from minference_jax.search.density import mean_density, scale_to_density
from minference_jax.search.driver import Search
from minference_jax.search.measure import LayerMeter
from minference_jax.search.plans import plan_masks, scored_tiles
from minference_jax.search.score import ROWS, output_errors
from minference_jax.search.verify import format_table, verify

CONFIG = LlamaConfig(61, 32, 40, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
SMALL = (AShape(64, 512), VerticalSlash(64, tiles=4, probes="spread"), BlockSparse(8))


@pytest.fixture(scope="module")
def model():
    return random_llama(CONFIG)


@pytest.fixture(scope="module")
def samples():
    return jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 520)), jnp.int32)


# The parts


def test_budgets_scale_within_what_a_prompt_holds():
    assert AShape(64, 512).scaled(0.5, 4096) == AShape(32, 256)
    assert AShape(64, 512).scaled(1e-9, 4096) == AShape(0, 1)
    assert AShape(64, 512).scaled(1e9, 300) == AShape(300, 300)
    assert VerticalSlash(100, 30).scaled(2.0, 4096) == VerticalSlash(200, 60)
    tiles = VerticalSlash(100, tiles=4, probes="spread")
    assert tiles.scaled(2.0, 4096) == VerticalSlash(200, tiles=8, probes="spread")
    assert tiles.scaled(1e9, 300) == VerticalSlash(300, tiles=5, probes="spread")
    assert BlockSparse(8).scaled(0.01, 4096) == BlockSparse(1)


def test_one_program_serves_all_budgets_of_a_kind():
    for candidate in (*default_candidates(), PerTile(4, 2e-5, 10, 10)):
        static = {jax.tree.structure(arrays([candidate.scaled(f, 1024)] * 3, 1024)) for f in (0.1, 0.3, 7.0)}
        assert len(static) == 1


def test_scored_tiles_are_spread_evenly():
    assert scored_tiles(1280, 99).tolist() == list(range(10))
    assert scored_tiles(1280, 5).tolist() == [1, 3, 5, 7, 9]
    assert scored_tiles(129, 1).tolist() == [1]


def test_adjusting_stops_just_below_the_target():
    factor = adjust(lambda f: np.asarray([1.0, 3.0, 1e9]) * np.floor(f * 100) / 100, 0.5, 0.3, 3)
    assert 0.48 <= factor[0] < 0.51
    assert 0.15 <= factor[1] < 0.18
    assert factor[2] == pytest.approx(0.3 * 2**-4.5)  # too dear everywhere: the cheapest


def test_errors_are_those_of_the_real_attention(rng):
    """All scored rows of every head, sample and kind of pattern, against plan, kernel and recall."""
    q, k, v = (jnp.asarray(rng.normal(size=(2, 520, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    lengths, tiles = jnp.asarray([520, 300]), jnp.asarray(scored_tiles(520, 99))
    heads = layer_patterns([AShape(20, 100), VerticalSlash(40, 60), VerticalSlash(30, tiles=2), BlockSparse(4)], 4)
    masks = plan_masks(q, k, heads, lengths, tiles)
    found = output_errors(q, k, v, masks.keys[None], tiles, lengths)
    plan = make_plan(q, k, heads, lengths=lengths)
    rows = np.arange(128 // ROWS // 2, 520, 128 // ROWS)
    valid = (rows[None] < np.asarray(lengths)[:, None])[..., None, None]
    out, dense = (
        np.asarray(attention)[:, rows] * valid
        for attention in (
            pallas_kernels.sparse_attention(q, k, v, plan, lengths=lengths, implementation="reference"),
            pallas_kernels.dense_attention(q, k, v, lengths=lengths, implementation="reference"),
        )
    )
    expected = np.linalg.norm(out - dense, axis=(1, 3)) / np.linalg.norm(dense, axis=(1, 3))
    np.testing.assert_allclose(found.error[0], expected, atol=2e-6)
    assert np.all(expected > 0.05)
    np.testing.assert_allclose(masks.density, plan.density(520, 520, lengths=lengths), atol=1e-6)
    # Recall is over the scored rows only, one in eight.
    np.testing.assert_allclose(found.recall[0], recall(q, k, plan, lengths=lengths), atol=0.03)


def test_best_at_equal_cost_prefers_the_cheaper_of_equals():
    cost = np.asarray([[0.2, 0.1, 0.3], [0.9, 0.8, 0.7]])
    error = np.asarray([[0.5, 0.5, 0.1], [0.1, 0.2, 0.3]])
    # Head 0: the third costs too much, the others err alike. Head 1: all cost too much, the cheapest it is.
    assert best_at_equal_cost(cost, error, 0.2).tolist() == [1, 2]


def test_budgets_go_where_they_lower_the_error_most():
    cost = np.asarray([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    error = np.asarray([[0.9, 0.5, 0.0], [0.3, 0.25, 0.2]])
    assert allocate(cost, error, 2.0).tolist() == [0, 0]
    assert allocate(cost, error, 5.0).tolist() == [2, 0]
    assert allocate(cost, error, 6.5).tolist() == [2, 1]
    assert allocate(cost, error, 1.0).tolist() == [0, 0]  # less than the cheapest: those
    assert allocate(cost[:, ::-1], error[:, ::-1], 5.0).tolist() == [0, 2]


def test_allocation_is_near_the_best_there_is(rng):
    """Against all 4⁵ choices: never over the total, and no worse than the best but for one step of one head."""
    for _ in range(5):
        cost = np.sort(rng.uniform(0.1, 1, (5, 4)), axis=1)
        error = -np.sort(-rng.uniform(0, 1, (5, 4)), axis=1)
        total = cost.min(1).sum() + 1.0
        chosen = allocate(cost, error, total)
        assert cost[np.arange(5), chosen].sum() <= total + 1e-9
        every = np.stack(np.meshgrid(*[np.arange(4)] * 5, indexing="ij"), -1).reshape(-1, 5)
        costs, errors = (x[np.arange(5), every].sum(1) for x in (cost, error))
        best = errors[costs <= total].min()
        assert error[np.arange(5), chosen].sum() <= best + error.max(1).max() / 2


def test_default_target_is_the_papers_at_its_length():
    assert default_target(32_768) == default_target(1 << 20) == AShape(1024, 4096)
    assert default_target(4096) == AShape(128, 512)


def test_measured_cost_is_a_line_in_the_density():
    model = CostModel((0.5, 0.0), (2.0, 1.0))
    np.testing.assert_allclose(model.of(0, np.asarray([0.0, 0.25])), [0.5, 1.0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": 1.5}, ValueError, "between 0 and 1"),
        ({"target": "cheap"}, TypeError, "target must be"),
        ({"target": Latency(1.0)}, ValueError, "cost='measured'"),
        ({"target": 0.3, "cost": "measured"}, ValueError, "is a time"),
        ({"cost": "free"}, ValueError, "cost must be"),
        ({"candidates": ()}, ValueError, "at least one"),
        ({"candidates": (Dense(),)}, TypeError, "no pattern with budgets"),
        ({"candidates": (VerticalSlash(coverage=0.9),)}, ValueError, "coverage"),
        ({"candidates": (VerticalSlash(tiles=4, threshold=0.1),)}, ValueError, "threshold"),
        ({"candidates": (SharedDensity(0.3, every=4),)}, ValueError, "shared by a layer's heads"),
        ({"candidates": [PerTile(m, 0.1) for m in (1, 2)]}, ValueError, "agree on every"),
        ({"objective": "best"}, ValueError, "objective must be"),
        ({"budgets": "none"}, ValueError, "budgets must be"),
        ({"query_tiles": 0}, ValueError, "query_tiles"),
        ({"end_tiles": -1}, ValueError, "end_tiles"),
    ],
)
def test_settings_name_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        Settings(**changes)


def test_latency_must_be_positive():
    with pytest.raises(ValueError, match="milliseconds"):
        Latency(0)


# The whole


def test_search_meets_the_target_and_beats_every_uniform_candidate(model, samples):
    """Total cost within the target; lower mean error than each candidate at equal cost, on the searched samples."""
    target = 0.45
    found = {
        budgets: search_patterns(model, samples, target=target, candidates=SMALL, budgets=budgets)
        for budgets in ("equal", "per-head")
    }
    assert np.mean(found["per-head"].densities) <= target + 1e-6
    assert np.max(found["equal"].densities) <= target * 1.05 + 1e-6
    alone = [search_patterns(model, samples, target=target, candidates=[c], budgets="equal") for c in SMALL]
    best = min(np.mean(p.scores) for p in alone)
    assert np.mean(found["equal"].scores) <= best
    assert np.mean(found["per-head"].scores) < best


def test_search_scales_the_threshold_of_a_probe_every_few_rows(model, samples):
    candidate = PerTile(4, 2e-5)
    found = search_patterns(model, samples, target=0.6, candidates=[candidate])
    thresholds = [pattern.threshold for layer in found for pattern in layer]
    assert all(isinstance(p, PerTile) and p.every == 4 for layer in found for p in layer)
    assert min(thresholds) < max(thresholds) and 0.5 < np.mean(found.densities) <= 0.6 + 1e-6
    made = [found.arrays().layer(i) for i in range(3)]
    layers = list(capture_qkv(model, samples))
    density = [make_plan(q, k, heads).density(520, 520) for (q, k, _), heads in zip(layers, made, strict=True)]
    np.testing.assert_allclose(np.mean(density), np.mean(found.densities), atol=1e-3)


def test_worst_case_objective_scores_by_the_worst_sample(model, samples):
    settings = {"target": 0.45, "candidates": SMALL[:1], "budgets": "equal"}
    mean, worst = (search_patterns(model, samples, objective=o, **settings) for o in ("mean", "worst"))
    assert np.all(np.asarray(worst.scores) >= np.asarray(mean.scores))
    assert np.any(np.asarray(worst.scores) > np.asarray(mean.scores))


def test_a_short_sample_counts_as_much_as_a_long_one(model, samples):
    """Scored at rows of its own: alone or beside a long one, its error is the same; the density is of all cells."""
    lengths = jnp.asarray([520, 140])
    padded = jnp.where(jnp.arange(520) < lengths[:, None], samples, 0)
    settings = Settings(target=0.6, candidates=SMALL[:1])
    both = LayerMeter(settings, lengths, 520)
    layers = list(capture_qkv(model, padded, lengths))
    record = both.measure(layers[1], *both.calibrate(layers[0]))
    assert np.all(record.error[:, 1].max(0) > 0)  # no row of the long sample's scored tiles but the first is in it
    step = settings.ladder.index(1.0)
    for at, length in enumerate((520, 140)):
        q, k, v = (x[at : at + 1, :length] for x in layers[1])
        tiles = jnp.asarray(scored_tiles(length, settings.query_tiles))
        heads = arrays([SMALL[0].scaled(float(f), 520) for f in record.factors[0]], length)
        masks = plan_masks(q, k, heads, jnp.asarray([length]), tiles)
        found = output_errors(q, k, v, masks.keys[None], tiles, jnp.asarray([length]))
        np.testing.assert_allclose(record.error[step, at], found.error[0, 0], atol=2e-6)
    visited = [
        cells * np.asarray(m.density[0])
        for cells, m in zip(
            both.cells,
            both.masks(both.samples(layers[1]), [SMALL[0].scaled(float(f), 520) for f in record.factors[0]]),
            strict=True,
        )
    ]
    np.testing.assert_allclose(record.density[step], sum(visited) / both.cells.sum(), atol=2e-6)
    assert np.all(record.density[step] <= 0.6 + 1e-6)


def test_the_ends_of_samples_are_scored_besides(model, samples):
    """The error of the spread rows as without them; then, of each sample, that of its last query tile."""
    lengths = jnp.asarray([520, 300])
    layers = list(capture_qkv(model, samples, lengths))
    records = []
    for end_tiles in (0, 1):
        meter = LayerMeter(Settings(target=0.6, candidates=SMALL[:1], end_tiles=end_tiles), lengths, 520)
        records.append(meter.measure(layers[1], *meter.calibrate(layers[0])))
    assert records[1].error.shape[1] == 4
    np.testing.assert_array_equal(records[0].error, records[1].error[:, :2])
    step = Settings().ladder.index(1.0)
    heads = arrays([SMALL[0].scaled(float(f), 520) for f in records[1].factors[0]], 520)
    for at, last in enumerate((4, 2)):
        q, k, v = (x[at : at + 1] for x in layers[1])
        masks = plan_masks(q, k, heads, lengths[at : at + 1], jnp.asarray([last]))
        found = output_errors(q, k, v, masks.keys[None], jnp.asarray([last]), lengths[at : at + 1])
        np.testing.assert_allclose(records[1].error[step, 2 + at], found.error[0, 0], atol=2e-6)


def test_target_that_is_dense_is_refused(model, samples):
    with pytest.raises(ValueError, match="leaves nothing to search"):
        search_patterns(model, samples, target=AShape(1024, 4096), candidates=SMALL)
    with pytest.raises(ValueError, match="at least 128 tokens"):
        search_patterns(model, samples[:, :100])


def test_measured_cost_searches_to_a_time(model, samples):
    """No timing can be promised; but what can afford next to nothing visits the least."""
    least, more = (
        search_patterns(model, samples, cost="measured", target=Latency(ms), candidates=SMALL[:1]) for ms in (1e-6, 5.0)
    )
    assert np.all(np.asarray(least.densities) <= more.densities) and np.mean(least.densities) < 0.6


class InterruptedByTestError(Exception):
    """Raised between layers."""


def test_interrupted_search_ends_with_the_same_file(model, samples, tmp_path):
    settings = Settings(target=0.45, candidates=SMALL[:2])
    search_to_file(model, samples, tmp_path / "whole.json", settings=settings, about={"model": "tiny"})

    def stop(done, total):
        if done:
            raise InterruptedByTestError

    for _ in range(2):  # killed twice, in different layers: the first call of `progress` is that of layer 1
        with pytest.raises(InterruptedByTestError):
            search_to_file(model, samples, tmp_path / "parts.json", settings=settings, progress=stop)
    assert not (tmp_path / "parts.json").exists()
    state = tmp_path / "parts.json.partial"
    assert list(json.loads(state.read_text())["layers"]) == ["0"]

    with pytest.raises(ValueError, match="belongs to another search"):
        search_to_file(model, samples, tmp_path / "parts.json", settings=Settings(target=0.5, candidates=SMALL[:2]))
    with pytest.raises(ValueError, match="belongs to another search"):
        search_to_file(model, samples[:1], tmp_path / "parts.json", settings=settings)

    search_to_file(model, samples, tmp_path / "parts.json", settings=settings, about={"model": "tiny"})
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not state.exists()
    about = load_about(tmp_path / "whole.json")
    assert about["model"] == "tiny"
    assert about["target"] == 0.45
    assert [sample["tokens"] for sample in about["samples"]] == [520, 520]
    assert load_patterns(tmp_path / "whole.json").scores is not None


def test_another_dtype_is_another_search(samples):
    """Weights that both dtypes hold exactly: layers measured in one do not go on in the other."""
    narrow = random_llama(CONFIG, dtype="bfloat16")
    wide = Llama.from_params(CONFIG, {name: x.astype(jnp.float32) for name, x in narrow.params().items()})
    first, second = (Search(network, samples, None, Settings()).identity() for network in (narrow, wide))
    assert first != second


def test_damaged_state_is_one_clear_error_and_restart_forgets_it(model, samples, tmp_path):
    state = tmp_path / "p.json.partial"
    for content in ("", "{}", '{"format": 3', "[]", '{"layers": {"0": 1}}'):
        state.write_text(content)
        with pytest.raises(ValueError, match=r"p\.json\.partial is no state of a pattern search"):
            search_to_file(model, samples, tmp_path / "p.json", settings=Settings(candidates=SMALL[:1]))
    search_to_file(model, samples, tmp_path / "p.json", settings=Settings(candidates=SMALL[:1]), restart=True)
    assert (tmp_path / "p.json").exists()


def small_search(path, progress=None):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 300)), jnp.int32)
    settings = Settings(target=0.5, candidates=(AShape(64, 512),))
    search_to_file(random_llama(CONFIG), tokens, path, settings=settings, progress=progress)


def wait_after_the_second(done, total):
    time.sleep(100 if done == 2 else 0)


def test_search_that_was_killed_goes_on(tmp_path):
    """A real process, killed without warning after its second layer."""
    out, partial = tmp_path / "p.json", tmp_path / "p.json.partial"
    code = "import sys, test_search as t; t.small_search(sys.argv[1], t.wait_after_the_second)"
    folder = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder.parent), str(folder)])}
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (partial.exists() and '"1":' in partial.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert len(json.loads(partial.read_text())["layers"]) == 2
    small_search(out)
    small_search(tmp_path / "again.json")
    assert out.read_bytes() == (tmp_path / "again.json").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.json", "p.json"]


def test_patterns_are_scaled_to_a_density_at_another_length(model, samples):
    found = HeadPatterns(((AShape(64, 512), VerticalSlash(64, tiles=4, probes="spread"), BlockSparse(8), Dense()),) * 3)
    scaled_ones = scale_to_density(model, samples, found, 0.65)
    reached = mean_density(list(capture_qkv(model, samples)), scaled_ones, jnp.asarray([520, 520]))
    assert 0.61 < reached <= 0.65
    assert [type(p) for p in scaled_ones.layers[0]] == [type(p) for p in found.layers[0]]
    least = scale_to_density(model, samples, found, 0.01)  # less than the diagonal: the smallest budgets
    assert least.layers[0][:3] == (AShape(2, 16), VerticalSlash(2, tiles=0, probes="spread"), BlockSparse(1))
    with pytest.raises(ValueError, match="density must be in"):
        scale_to_density(model, samples, found, 35)


def test_verify_gives_no_candidate_less_than_the_searched(model, samples):
    patterns = HeadPatterns.uniform(AShape(8, 64), 3, 4)
    rows = verify(model, samples[:1], {"searched": patterns}, candidates=SMALL[:2])
    assert [rows[0].name, rows[1].name, len(rows)] == ["dense", "searched", 4]
    assert all(row.density >= rows[1].density - 1e-6 for row in rows[2:])
    assert all(row.error > 0 and row.perplexity > 1 for row in rows[1:])
    dense = np.asarray(model.token_log_likelihoods(samples[:1]))
    assert rows[0].perplexity == pytest.approx(np.exp(-dense.sum() / 519), rel=1e-5)
    assert rows[1].error >= rows[2].error  # the same pattern, with no less budget
    table = format_table(rows)
    assert table.count("\n") == 1 + len(rows)
    assert "| dense | 1.0000 |" in table
