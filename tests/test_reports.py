"""Reports as pages: paired differences, where replies part, what was run, no picture library, comparisons."""

import json
import re

import pytest
from checkpoints import write_byte_model
from helpers import run_command

from minference_jax.compare.comparison import Comparison, LayerDifference, Tolerance
from minference_jax.compare.page import comparison_page
from minference_jax.compare.task import TaskComparison
from minference_jax.eval.paired import differences, of_losses, of_scores
from minference_jax.eval.plots import figures
from minference_jax.eval.report import write_report
from minference_jax.eval.results import Result
from minference_jax.viz import figure
from minference_jax.viz.page import Page, parting


def results(lengths=(1024,)):
    """Dense attention is right 9 times of 10, the window 5 times, on the same prompts and the rest."""
    return [
        Result(m, "kv", n, i, float(i < right), reply=f"the answer is {i if i < right else 'none'}", density=d)
        for m, right, d in (("dense", 9, 1.0), ("window", 5, 0.2))
        for n in lengths
        for i in range(10)
    ]


def test_differences_are_those_of_the_same_prompts():
    (one,) = differences([*results(), Result("window", "kv", 1024, 99, 1.0)])  # a prompt that dense has no result of
    assert (one.method, one.task, one.length, one.count) == ("window", "kv", 1024, 10)
    assert one.value == pytest.approx(-40)
    # Agresti and Min (2005) for 10 pairs, 4 lost and none won: (-4/12) ± 1.96 · sqrt(5 - 16/12) / 12.
    assert (one.low, one.high) == (pytest.approx(-64.61, abs=0.01), pytest.approx(-2.06, abs=0.01))
    assert of_scores([0.0] * 10)[1:] == (pytest.approx(-0.1633, abs=1e-4), pytest.approx(0.1633, abs=1e-4))
    assert of_losses([0.1, 0.3]) == (pytest.approx(0.2), pytest.approx(0.004), pytest.approx(0.396))
    losses = {"dense": 2.0, "window": 2.01}
    (loss,) = differences([Result(m, "ppl", 512, i, nll=nll, tokens=9) for m, nll in losses.items() for i in (1, 2)])
    assert loss.likelihood and loss.value == pytest.approx(1.005, abs=1e-3) and loss.low == pytest.approx(loss.high)
    assert differences(results()[:10]) == []


@pytest.mark.parametrize(
    ("text", "other", "rest"),
    [
        ("a cat sat", "a cat sat", ""),
        ("a cat sat", "a cow sat", "cat sat"),
        ("a cat", "a cat sat", ""),
        ("a cat sat on", "a cat", " sat on"),
        ("12 Elm", "17 Elm", "12 Elm"),
        ("", "x", ""),
    ],
)
def test_texts_part_at_a_word(text, other, rest):
    assert text[parting(text, other) :] == rest


def test_replies_are_marked_where_they_part():
    page = Page("T")
    page.replies({"dense": "it is <12>", "a": "it is 13", "b": "it"}, right="12")
    text = page.html()
    assert "it is &lt;12&gt;</div>" in text and "it is <mark>13</mark>" in text and "it<mark>∎</mark>" in text
    assert "right answer" in text and "<script" not in text and "http" not in text


def test_the_page_says_what_was_run_and_how_sure_it_is(tmp_path):
    run = {"command": "minference-jax eval", "weights": "ab" * 32, "versions": {"jax": "1"}, "methods": ["dense", "w"]}
    write_report(results(), tmp_path, "Tiny", run)
    page = (tmp_path / "report.html").read_text()
    for fact in ("minference-jax eval", "abababababab<", "jax 1", "-40.0 points", "-64.6 to -2.1"):
        assert fact in page
    assert page.count("<svg") == 2 and 'src="http' not in page and "<link" not in page
    # The prompts that differ come first; what dense attention found stands beside the window's reply.
    first = re.search(r"prompt (\d+)</h3>(.+?)<h3", page, re.DOTALL)
    assert first is not None and 5 <= int(first[1]) < 9 and "<mark>none</mark>" in first[2]


def test_one_length_is_bars_and_several_are_lines():
    assert [len(axes.patches) for axes in figures(results())["score-retrieval"].axes] == [2]
    assert [len(axes.patches) for axes in figures(results((512, 1024)))["score-retrieval"].axes] == [0]


def test_without_matplotlib_the_page_and_the_commands_say_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(figure.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("minference_jax.eval.report.has_matplotlib", lambda: False)
    written = write_report(results(), tmp_path)
    assert [path.name for path in written] == ["report.md", "report.html"]
    assert "No pictures: matplotlib is not installed" in written[1].read_text()
    status, _, error = run_command(capsys, "inspect", "--patterns", "x.json", "--plot", tmp_path / "a.png")
    assert status == 2 and "--plot: no pictures: matplotlib is not installed" in error


COMPARISON = Comparison(
    *("tiny", "float32", None, 64, 64),
    layers=(LayerDifference("embedding", 0.0, 0.0, 1.0), LayerDifference("layer 0", 2e-6, 1e-6, 2.0)),
    logit_max=1e-4,
    logit_rms=1e-5,
    logit_scale=2.0,
    kl=1e-9,
    argmax_agreement=1.0,
    largest_lost_margin=0.0,
    greedy_ours=((1, 2),),
    greedy_torch=((1, 2),),
    perplexity_ours=8.0,
    perplexity_torch=8.0,
    seconds_ours={"load": 1.0, "compile": 2.0, "prefill": 0.5},
    seconds_torch={"load": 1.0, "prefill": 0.7},
    versions={"jax": "1", "torch": "2"},
    tolerance=Tolerance.default("float32"),
)


def test_a_comparison_is_a_page():
    page = comparison_page(
        COMPARISON, {"command": "minference-jax compare"}, replies=[{"PyTorch": "a b", "JAX": "a c"}]
    )
    for text in ("Within tolerance.", "minference-jax compare", "2.00e-06", "a <mark>c</mark>", "torch 2", "≤ 2e-03"):
        assert text in page
    assert page.count("<svg") == 1
    task = TaskComparison("kv", 64, (1.0,), (0.0,), ("12",), ("13",), 0.0, COMPARISON, (("12",),))
    page = comparison_page(COMPARISON, {}, task=task)
    assert "0 % of 1 replies are the same" in page and "<mark>12</mark>" in page and "right answer" in page


def test_inspect_fits_eighty_columns(tmp_path, capsys, monkeypatch):
    model = write_byte_model(tmp_path / "model")
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run_command(capsys, "inspect", model)
    assert status == 0 and "vocab_size" in out and max(map(len, out.splitlines())) <= 80
    assert json.loads(run_command(capsys, "inspect", model, "--json")[1])["config"]["rope"]["theta"] == 10000.0
