"""The runner: batches give what single prompts give, nothing compiles twice, a killed run goes on, and the report."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_tokenizer import WordTokenizer
from numpy_llama import random_params

from minference_jax.attention import make_plan
from minference_jax.eval.baselines import BigBird, Longformer
from minference_jax.eval.methods import METHODS, Method, plan_density, question_for, vertical_slash_for
from minference_jax.eval.metrics import starts_with
from minference_jax.eval.perplexity import Perplexity
from minference_jax.eval.report import markdown, write_report
from minference_jax.eval.results import Result, ResultFile, perplexity_cell, score_cell
from minference_jax.eval.runner import evaluate, padded, run_batch
from minference_jax.eval.samples import Sample
from minference_jax.models import LlamaConfig
from minference_jax.models.capture import capture_qkv
from minference_jax.models.llama import Llama
from minference_jax.patterns import AShape, HeadPatterns, Pattern, SharedDensity, VerticalSlash
from minference_jax.search.density import mean_density, share_among_layers

CONFIG = LlamaConfig(61, 32, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
TEXT = "".join(f"word{chr(97 + i % 26)} and then, {i % 10} " for i in range(300))


class Numbers:
    """Prompts of random ids and unequal lengths; the answer is the first id of the reply being even."""

    name = "numbers"

    def __init__(self, shortest=3, longest=100):
        self.shortest, self.longest = shortest, longest

    def sample(self, tokenizer, length, index, seed):
        rng = np.random.default_rng([seed, index])
        ids = rng.integers(1, 61, rng.integers(self.shortest, self.longest + 1))
        return Sample(self.name, length, index, tuple(ids.tolist()), ("even",), 6, {"depth": index % 2 / 2})

    def score(self, reply, answers):
        return starts_with(reply, answers)


class Ids:
    """Decodes ids as text that a score can be read from."""

    eos_token_ids = (60,)

    def decode(self, ids, *, skip_special_tokens=False):
        return ("even " if ids[0] % 2 == 0 else "odd ") + " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_params(CONFIG, {name: jnp.asarray(value) for name, value in random_params(CONFIG).items()})


SPARSE = Method.fixed("window", AShape(sink=4, window=65))
DENSE = Method("dense", METHODS["dense"])


def test_a_batch_of_unequal_prompts_gives_the_answers_of_single_runs(model):
    model, task = model.with_patterns(AShape(sink=4, window=65)), Numbers(shortest=130, longest=256)
    group = [task.sample(None, 256, index, 0) for index in range(8)]
    assert len({len(sample.tokens) for sample in group}) > 4
    together = run_batch(model, Ids(), task, group, "x", 8)
    alone = [run_batch(model, Ids(), task, [sample], "x", 1)[0] for sample in group]
    assert [result.reply for result in together] == [result.reply for result in alone]
    assert [result.score for result in together] == [result.score for result in alone]
    np.testing.assert_allclose([r.density for r in together], [r.density for r in alone], atol=1e-5)


def test_nothing_compiles_within_a_bucket(model):
    compiled = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            compiled.append((event, duration_secs))

    arguments: dict[str, Any] = {"lengths": [128], "methods": [DENSE, SPARSE], "batch": 3}
    evaluate(model, Ids(), [Numbers()], samples=3, **arguments)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 5 + 1)(jnp.ones(7)).block_until_ready()
        assert compiled  # the listener does hear compilations
        compiled.clear()
        results = evaluate(model, Ids(), [Numbers()], samples=8, seed=1, **arguments)  # the last batch is not full
        assert len(results) == 16 and compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_report(model, tmp_path):
    arguments: dict[str, Any] = {"lengths": [128], "methods": [DENSE, SPARSE], "samples": 7, "batch": 3}
    whole = evaluate(model, Ids(), [Numbers()], path=tmp_path / "whole.jsonl", **arguments)

    class KilledError(Exception):
        pass

    def kill(done: int, total: int, what: str) -> None:
        assert total == 14
        if done > 4:
            raise KilledError

    path = tmp_path / "killed.jsonl"
    with pytest.raises(KilledError):
        evaluate(model, Ids(), [Numbers()], path=path, progress=kill, **arguments)
    lines = path.read_bytes()
    path.write_bytes(lines[:-9])  # killed while it wrote
    seen = []
    again = evaluate(
        model, Ids(), [Numbers()], path=path, progress=lambda done, total, _: seen.append((done, total)), **arguments
    )
    assert seen[0] == (5, 14) and seen[-1] == (14, 14)
    order = [result.key for result in whole]
    assert sorted(again, key=lambda r: order.index(r.key)) == whole
    assert markdown(again) == markdown(whole)
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()[1:8]] == list(range(7))

    def no_batch(done: int, total: int, what: str) -> None:
        assert (done, what) == (14, "done")

    # A third run has nothing to do; other settings are refused.
    assert evaluate(model, Ids(), [Numbers()], path=path, progress=no_batch, **arguments) == again
    with pytest.raises(ValueError, match=r"killed.jsonl is of another run: seed 0 instead of 1"):
        evaluate(model, Ids(), [Numbers()], path=path, seed=1, **arguments)
    for text in ("{}\n", "notes", '{"other": '):
        path.write_text(text)
        with pytest.raises(ValueError, match="no file of results"):
            ResultFile(path, {})
        assert path.read_text() == text


def test_a_file_cut_off_in_its_first_line_begins_anew(tmp_path):
    path = tmp_path / "results.jsonl"
    for text in ("", '{"sett', '{"settings": {"seed"'):
        path.write_text(text)
        assert ResultFile(path, {"seed": 1}).results == []
        assert path.read_text() == '{"settings": {"seed": 1}}\n'


def test_a_length_that_a_task_cannot_have_is_refused_before_anything_runs(model):
    ran = []
    tasks, lengths = [Numbers(), Perplexity(TEXT)], [128, 10**6]
    with pytest.raises(ValueError, match="too long"):
        evaluate(
            *(model, WordTokenizer(), tasks),
            lengths=lengths,
            methods=[DENSE],
            samples=1,
            progress=lambda *state: ran.append(state),
        )
    assert ran == []


def test_a_deadline_ends_a_run(model):
    assert evaluate(model, Ids(), [Numbers()], lengths=[128], methods=[DENSE], samples=2, deadline=0.0) == []


def test_perplexity_is_that_of_the_logits(model):
    tokenizer = WordTokenizer()
    task = Perplexity(TEXT, windows=3)
    results = evaluate(model, tokenizer, [task], lengths=[100], methods=[DENSE], samples=3, batch=2)
    ids = np.asarray(task.sample(tokenizer, 100, 1, 0).tokens)
    logits = np.asarray(model(jnp.asarray(ids[None])), np.float64)[0, :-1]
    expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(99), np.minimum(ids[1:], 60)]
    assert results[1].nll == pytest.approx(expected.mean(), rel=1e-5) and results[1].tokens == 99
    cell = perplexity_cell(results)
    assert cell is not None and cell.value == pytest.approx(np.exp(np.mean([r.nll for r in results])))
    some = dataclasses.replace(task.sample(tokenizer, 100, 1, 0), scored=(7, 40))
    scored = run_batch(model, tokenizer, task, [some], "dense", 2)[0]
    assert scored.tokens == 2 and scored.nll == pytest.approx(expected[[6, 39]].mean(), rel=1e-5)
    assert cell.low < cell.value < cell.high and score_cell(results) is None


def test_padded_repeats_the_last_prompt_up_to_a_full_batch():
    tokens, lengths = padded([(1, 2, 3), (4,)], 4)
    assert tokens.shape == (4, 128) and lengths.tolist() == [3, 1, 1, 1]
    assert tokens[:, :4].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [4, 0, 0, 0], [4, 0, 0, 0]]


@pytest.mark.parametrize("length", [300, 1024])
def test_plan_density_is_that_of_the_plan(rng, length):
    q = jnp.zeros((1, length, 2, 8))
    for pattern, counted in (
        (AShape(sink=70, window=129), plan_density(length, bands=[64, 128], sink=70)),
        (Longformer(window=65, sink=5, question=9), plan_density(length, bands=[64], sink=5, question=9)),
    ):
        made = jax.jit(lambda pattern=pattern: make_plan(q, q, pattern).density(length, length))()
        np.testing.assert_allclose(made, counted, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dense"}))
def test_methods_keep_to_the_density(rng, model, name):
    length, density = 2048, 0.4
    q, k = (jnp.asarray(rng.standard_normal((1, length, n, 8)), "float32") for n in (2, 1))
    pattern = METHODS[name](model, length, density)

    @jax.jit
    def visited(q, k):
        return make_plan(q, k, pattern).density(length, length)

    found = np.asarray(visited(q, k))
    most = density
    if isinstance(pattern, Pattern) and pattern.share() is not None:
        found = found.mean()  # heads share it
    elif isinstance(pattern, VerticalSlash):
        # An estimate; columns are dearest at the start, tiles next to the diagonal.
        bands = [64 * (i + 1) for i in range(pattern.tiles or 0)]
        most = plan_density(length, bands=bands, sink=pattern.columns)
    # Random tiles that fall into the window cost nothing.
    assert np.all(found <= most + 1e-3) and np.all(found >= (0.25 if isinstance(pattern, BigBird) else 0.3))


def test_budgets_grow_with_length_and_density():
    small, large, loose = (vertical_slash_for(n, d) for n, d in ((4096, 0.3), (8192, 0.3), (8192, 0.5)))
    assert (small.tiles or 0) < (large.tiles or 0) < (loose.tiles or 0) and small.columns < large.columns
    found = [question_for(n, 0.2) for n in (1024, 4095, 8192, 32768, 1 << 20)]
    assert [p.every for p in found] == [1, 1, 4, 16, 16] and [p.question for p in found[:3]] == [102, 409, 819]


def test_measured_budgets_keep_their_proportions_and_the_density(model):
    patterns = HeadPatterns(((AShape(64, 640), VerticalSlash(400, tiles=6)) * 2,) * model.config.num_layers)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 700)
    named = [("minference", METHODS["minference"])]
    for name, given in (("searched", patterns), *named):
        found = Method.measured(name, given, tokens).choose(model, 1024, 0.5)  # of a prompt that repeats the tokens
        assert isinstance(found, HeadPatterns)
        layers = list(capture_qkv(model, jnp.asarray([[*tokens, *tokens[:324]]])))
        assert 0.44 < mean_density(layers, found, jnp.asarray([1024])) <= 0.5
        if given is patterns:
            window, lines, *_ = found.layer(0)
            assert isinstance(window, AShape) and isinstance(lines, VerticalSlash)
            assert abs(window.window - 10 * window.sink) <= 10 and lines.columns < 400
    # Layers differ in their share, heads of a layer do not.
    shared = share_among_layers(model, jnp.asarray([tokens]), SharedDensity(0.6, every=4))
    assert len(set(shared.layer(0))) == 1 and shared.layer(0)[0] != shared.layer(1)[0]
    assert np.mean([p.share() for layer in shared for p in layer]) <= 0.6 + 1e-6
    with pytest.raises(TypeError, match="must have a density"):
        share_among_layers(model, jnp.asarray([tokens]), VerticalSlash(400, tiles=6))
    with pytest.raises(TypeError, match="no budgets to scale"):
        Method.measured("dense", METHODS["dense"], tokens).choose(model, 1024, 0.5)


def results_of_two_methods():
    return [
        Result(method, task, length, i, float(i < right), density=density, about={"depth": i % 2 / 2})
        for method, right, density in (("dense", 10, 1.0), ("window", 4, 0.25))
        for task in ("needle-magic-raw", "needle-address-raw")
        for length in (1024, 2048)
        for i in range(10)
    ] + [Result(m, "ppl", 1024, i, nll=2.0 + i / 10, tokens=1023) for m in ("dense", "window") for i in range(2)]


def test_the_report_has_averages_tasks_and_plots(tmp_path):
    written = write_report(results_of_two_methods(), tmp_path, "Tiny <model>")
    text = (tmp_path / "report.md").read_text()
    assert "### 1,024 tokens" in text and "| method | density | niah (2 tasks) | ppl |" in text
    assert (
        "| window | 0.250 | 40.0 [21.9, 61.3] at 0.250 | 7.77 [" in text
        and "| dense | 1.000 | 100.0 [83.9, 100.0] |" in text
    )
    assert "### needle-address-raw" in text and "do not compare" not in text
    wider = [
        dataclasses.replace(r, method="wider", density=0.28) for r in results_of_two_methods() if r.density == 0.25
    ]
    warning = "At 1,024 tokens the densities differ by more than a tenth, so do not compare: window 0.250, wider 0.280."
    assert warning in markdown([*results_of_two_methods(), *wider])
    part = [r for r in results_of_two_methods() if (r.method, r.task) != ("window", "needle-magic-raw")]
    assert "| window | 0.250 | — | 7.77 [" in markdown(part)  # no average over other tasks than dense attention's
    page = (tmp_path / "report.html").read_text()
    assert "Tiny &lt;model&gt;" in page and page.count("<svg") == 5
    write_report(results_of_two_methods(), tmp_path / "again", "Tiny <model>")
    assert (tmp_path / "again" / "report.html").read_text() == page
    names = {path.name for path in written}
    pictures = ("needle", "score-niah", "perplexity", "difference", "difference-likelihood")
    assert names == {"report.md", "report.html", *(f"{name}.svg" for name in pictures)}
