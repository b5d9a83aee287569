"""`bench tradeoff`: speed-up against RULER points lost, from what `eval` and `bench operator` measured."""

import dataclasses
import json

import pytest
from helpers import run_command

from minference_jax.bench.operator import OperatorRow
from minference_jax.bench.tradeoff import from_json
from minference_jax.bench.tradeoff_plot import draw
from minference_jax.bench.tradeoff_points import Point, make_points
from minference_jax.eval.results import Result, ResultFile, Run

SHARED, WINDOW = "shared-density:density=0.2,every=8", "a-shape:sink=64,window=257"
SETTINGS = {"seed": 0, "density": 0.2, "tasks": {"ruler-vt": "aa", "ruler-cwe": "bb"}}
# Of each method, the scores of two tasks; dense attention has one prompt of vt more.
SCORES = {"dense": ((1, 1, 0, 1), (1, 0.5)), SHARED: ((1, 0, 0), (1, 0.5)), "a-shape": ((0, 0, 0), (0.5, 0))}


def results(scores=SCORES, length=1024, density=0.2):
    return [
        Result(method, task, length, i, float(score), density=1.0 if method == "dense" else density)
        for method, tasks in scores.items()
        for task, found in zip(("ruler-vt", "ruler-cwe"), tasks, strict=True)
        for i, score in enumerate(found)
    ]


def run(*found, **settings):
    return Run(SETTINGS | settings, {"model": "tiny"}, [*found, Result("dense", "ppl", 1024, 0, nll=2.0, tokens=9)])


def row(pattern=SHARED, length=1024, density=0.2, whole=2.0, dense=6.0, inputs="random 4/2/64"):
    return OperatorRow(pattern, inputs, length, density, 0.1, 0.1, 0.1, whole, dense, dense / whole, "xla")


ROWS = (row(), row(WINDOW, density=0.21, whole=1.0), row("a-shape:sink=64,window=513", density=0.26))


def test_a_point_is_a_paired_difference_and_the_time_of_the_same_pattern():
    window, shared = sorted(make_points([run(*results())], ROWS), key=lambda point: point.method)
    # vt: 0, −1, 0, cwe: 0, 0; the variances are 1/3 of 3 prompts and 0 of 2.
    assert shared == Point(
        "shared-density", SHARED, 1024, 0.2, 0.2, 3.0, shared.ruler_difference, *_error(1 / 3, 3, 0, 2)
    )
    assert shared.ruler_difference == pytest.approx(-100 / 6)
    # vt: −1, −1, 0, cwe: −.5, −.5. Named by its family, so the time is that of the nearest density.
    assert window == Point("a-shape", WINDOW, 1024, 0.2, 0.21, 6.0, window.ruler_difference, *_error(1 / 3, 3, 0, 2))
    assert window.ruler_difference == pytest.approx(-100 * (2 / 3 + 0.5) / 2)


def _error(first, of_first, second, of_second):
    return pytest.approx(100 * (first / of_first + second / of_second) ** 0.5 / 2), 2, 2


def test_runs_of_several_densities_share_their_dense_attention():
    sparse = {"a-shape": SCORES["a-shape"], "shared-density:density=0.20, every=8": SCORES[SHARED]}
    other = run(*results(sparse, density=0.25), density=0.25)
    points = make_points([run(*results()), other], ROWS)
    # The pattern's text is the same rule at any --density, and its first results count.
    assert [(p.method, p.density, p.timed_density) for p in points] == [
        ("shared-density", 0.2, 0.2),
        ("shared-density", 0.25, 0.2),
        ("a-shape", 0.2, 0.21),
        ("a-shape", 0.25, 0.26),
    ]
    assert [p.unlike for p in points] == [False, True, False, False]


def test_layers_of_a_model_count_by_their_sums():
    layers = [row(whole=w, dense=d, density=s, inputs=f"m, layer {w}") for w, d, s in ((1, 2, 0.1), (3, 10, 0.3))]
    (point,) = make_points([run(*results({name: SCORES[name] for name in ("dense", SHARED)}))], layers)
    assert (point.speedup, point.timed_density) == (3.0, pytest.approx(0.2))


NO_POINTS = {
    "no dense attention": ([run(*results({SHARED: SCORES[SHARED]}))], ROWS, f"dense attention .* there is {SHARED}"),
    "no RULER": ([run()], ROWS, "no RULER task"),
    "a length without dense": (
        [run(*results(), *results({SHARED: SCORES[SHARED]}, 2048))],
        ROWS,
        "no RULER scores at 2,048 tokens",
    ),
    "a task that one method lacks": ([run(*results()[:-2])], ROWS, r"a-shape at 1,024 tokens .* ruler-cwe \(0\)"),
    "no time": ([run(*results())], ROWS[1:], rf"no times of {SHARED} \(0.200\) at 1,024 tokens; there are {WINDOW}"),
    "a time of another length": ([run(*results())], [row(length=2048), *ROWS[1:]], "at 1,024 tokens; there are"),
    "a family at another density": ([run(*results())], (ROWS[0], ROWS[2]), r"no times of a-shape \(0.200\)"),
    "times on different inputs": (
        [run(*results())],
        [row(), row(WINDOW, inputs="m, layer 3")],
        "different inputs do not compare: m; random",
    ),
    "another seed": ([run(*results()), run(seed=1)], ROWS, "different models or prompts: seed 0 instead of 1"),
    "other texts": ([run(*results()), run(tasks={"ruler-vt": "cc"})], ROWS, "ruler-vt 'aa' instead of 'cc'"),
    "other prompts": (
        [run(*results()[:6], *(dataclasses.replace(one, answers=("7",)) for one in results()[6:]))],
        ROWS,
        "prompt . of ruler-.* is not the same",
    ),
    "no density": (
        [run(*(dataclasses.replace(one, density=None) for one in results()))],
        ROWS,
        "at 1,024 tokens has no density",
    ),
}


@pytest.mark.parametrize("runs, rows, message", NO_POINTS.values(), ids=NO_POINTS)
def test_what_does_not_fit_is_named(runs, rows, message):
    with pytest.raises(ValueError, match=message):
        make_points(runs, rows)


def point(method="shared-density", tokens=1024, density=0.2, speedup=2.0, lost=1.0, timed=None):
    return Point(method, f"{method}:x", tokens, density, timed or density, speedup, -lost, 0.5, 11, 24)


def test_the_picture_has_a_panel_for_each_length_and_says_every_density():
    points = [point(tokens=n, density=d, speedup=0.3 / d) for n in (1024, 4096, 1000) for d in (0.2, 0.1)]
    points.append(point("mine", 1024, 0.05, 9.0, lost=40.0, timed=0.1))
    figure = draw(points, "a heading")
    assert [panel.get_title() for panel in figure.axes] == ["1000 tokens", "1K tokens", "4K tokens"]
    first, second, _ = figure.axes
    assert [text.get_text() for text in second.texts] == [".1", ".2", ".05"]
    assert (first.get_yscale(), second.get_yscale(), second.get_xscale()) == ("linear", "log", "symlog")
    low, high = second.get_xlim()
    assert low < 0 and high > 40 and second.get_ylim()[0] < 1
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["dense attention", "SharedDensity (this package)", "mine"]
    assert "hollow" in legend.get_title().get_text()
    near = draw(points[:1])  # nothing lost far away: to scale, and 0 and 1 can be seen
    assert near.axes[0].get_xscale() == "linear" and near.axes[0].get_xlim()[0] < 0 < 2 <= near.axes[0].get_xlim()[1]
    assert near.axes[0].get_ylim()[0] < 1 and "hollow" not in near.legends[0].get_title().get_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"speedup": None}, "row 1 .* speedup is None"),
        ({"prompts": 0.5}, "row 1 .* prompts is 0.5"),
        ({"pattern": 3}, "row 1 .* pattern is 3"),
        ({"nonsense": 3}, "row 1 .*nonsense"),
    ],
)
def test_rows_that_are_no_points_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        from_json({"rows": [dataclasses.asdict(point()) | change]})


def test_the_command_joins_both_files_and_draws_again_what_it_printed(tmp_path, capsys):
    kept = ResultFile(tmp_path / "results.jsonl", SETTINGS, {"model": "tiny"})
    kept.append(results())
    with open(kept.path, "a") as file:
        file.write('{"method": "dense", "ta')  # of a run that goes on
    environment = {"device": "a GPU", "jax": "1"}
    times = tmp_path / "operator.json"
    times.write_text(json.dumps({"environment": environment, "rows": [dataclasses.asdict(one) for one in ROWS]}))
    joined = ("bench", "tradeoff", "--results", tmp_path, "--operator", times)
    status, out, _ = run_command(capsys, *joined, "--json")
    found = json.loads(out)
    assert (status, found["model"], found["environment"], found["inputs"]) == (0, "tiny", environment, "random 4/2/64")
    assert from_json(found) == make_points([run(*results())], ROWS)
    (tmp_path / "again.json").write_text(out)
    status, out, _ = run_command(
        capsys, "bench", "tradeoff", "--rows", tmp_path / "again.json", "--plot", tmp_path / "a.png"
    )
    assert status == 0 and "-16.7 ± 16.7" in out and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    times.write_text(json.dumps({"environment": environment, "rows": [{"pattern": "dense"}]}))
    assert "row 1 is none of bench operator" in run_command(capsys, *joined)[2]
