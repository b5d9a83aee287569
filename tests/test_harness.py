"""The adapter of lm-evaluation-harness: each kind of request against the model itself, and the real package."""

import jax.numpy as jnp
import numpy as np
import pytest
from eval_tokenizer import NumberTokenizer, WordTokenizer
from numpy_llama import random_llama

from minference_jax.eval.harness import HarnessRequests, harness_model
from minference_jax.jobs.choices import continuation_scores
from minference_jax.models.config import LlamaConfig
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama

CONFIG = LlamaConfig(400, 32, 40, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, max_position_embeddings=64)


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_llama(CONFIG)


def log_p(model, ids, first):
    return float(model.token_log_likelihoods(jnp.asarray([ids]))[0, first:].sum())


def test_continuations_have_their_log_likelihood(model):
    tokenizer = WordTokenizer()
    requests = HarnessRequests(model, tokenizer, batch=2)
    pairs = [("The sea is", " blue"), ("The sea is", " very deep"), ("So ", "it goes"), ("", "One"), ("Cats", " sleep")]
    greedy = requests.loglikelihood(pairs)
    for (context, continuation), (score, _) in zip(pairs, greedy, strict=True):
        before = tokenizer.encode(context.rstrip()) or [requests.prefix]
        ids = before + tokenizer.encode(context[len(context.rstrip()) :] + continuation)
        assert score == pytest.approx(log_p(model, ids, len(before)), abs=1e-4)
    assert not any(likeliest for _, likeliest in greedy)  # of 400 tokens


def test_what_greedy_decoding_writes_is_greedy(model):
    logits, cache = model.prefill(jnp.asarray([[5, 6, 7]]), None, model.init_cache(1, 256))
    first, second, third = generate(model, [[5, 6, 7]], max_new_tokens=3, eos_token_ids=()).sequences()[0]
    other = (third + 1) % 400
    labels = [[[first, second, third], [first, second, other], [other, second], [first]]]
    scores, greedy = continuation_scores(model, logits, cache, labels, room=(8, 4))
    assert greedy[0].tolist() == [True, False, False, True] + [False] * 4
    assert np.isneginf(np.asarray(scores)[0, 4:]).all() and np.isfinite(np.asarray(scores)[0, :4]).all()


@pytest.mark.parametrize("words", [3, 7, 8, 20])
def test_a_long_text_is_scored_in_windows_each_token_once(model, words):
    tokenizer = WordTokenizer()
    requests = HarnessRequests(model, tokenizer, batch=2, max_length=7)
    text = " ".join(f"w{'abcdefghijklmnopqrstuvwxyz'[i]}" for i in range(words))
    ids = [requests.prefix, *tokenizer.encode(text)]
    expected, first = 0.0, 1
    while first < len(ids):  # at most 7 tokens before the last one that is scored
        end = min(first + 7, len(ids))
        begin = max(0, end - 8)
        expected += log_p(model, ids[begin:end], first - begin)
        first = end
    (found,) = requests.loglikelihood_rolling([text])
    assert found == pytest.approx(expected, abs=1e-4)


def test_replies_end_before_the_first_end(model):
    tokenizer = NumberTokenizer()
    requests = HarnessRequests(model, tokenizer, batch=2)
    whole = generate(model, [tokenizer.encode("Say so")], max_new_tokens=6, eos_token_ids=(0,)).sequences()[0]
    words = " ".join(map(str, whole))
    third = f" {whole[2]}"
    asked = [("Say so", {"max_gen_toks": 6}), ("Say so", {"max_gen_toks": 6, "until": ["nothing", third]})]
    assert requests.generate_until(asked) == [words, words[: words.index(third)]]
    long = " ".join(["word"] * 90)  # loses its beginning: 64 tokens in all
    kept = tokenizer.encode(long)[-58:]
    expected = tokenizer.decode(generate(model, [kept], max_new_tokens=6, eos_token_ids=(0,)).sequences()[0])
    assert requests.generate_until([(long, {"max_gen_toks": 6, "do_sample": False, "temperature": 2})]) == [expected]


def test_wrong_settings_and_a_missing_package_are_named(model, monkeypatch):
    with pytest.raises(ValueError, match="batch, max_length and max_new_tokens"):
        HarnessRequests(model, WordTokenizer(), batch=0)
    with pytest.raises(ValueError, match="does not fit max_length 3"):
        HarnessRequests(model, WordTokenizer(), max_length=3).loglikelihood([("a", " b c d")])
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs lm_eval: pip install 'minference-jax\[harness\]'"):
        harness_model(model, WordTokenizer())


@pytest.mark.filterwarnings("default")  # the harness's own, and those of what it imports
def test_the_real_harness_runs_a_task(model):
    """Choices, replies and rolling likelihoods through `simple_evaluate`, on tasks defined here."""
    lm_eval = pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    configured = pytest.importorskip("lm_eval.api.task").ConfigurableTask
    rows = [
        {"q": "The sea is", "choices": ["blue", "red sand"], "gold": 0},
        {"q": "Cats", "choices": ["sing", "sleep"], "gold": 1},
    ]
    shared = {"custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)}, "test_split": "test"}
    kinds = {
        "mine-choice": {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices"},
        "mine-reply": {"output_type": "generate_until", "doc_to_text": "{{q}}", "generation_kwargs": {"until": ["\n"]}},
        "mine-text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}"},
    }
    targets = {"mine-choice": "gold", "mine-reply": "{{choices[gold]}}"}
    tasks = []
    for name, kind in kinds.items():
        config = {"task": name, "doc_to_target": targets.get(name), **shared, **kind}
        if name == "mine-text":
            config["metric_list"] = [{"metric": "word_perplexity"}]
        tasks.append(configured(config=config))
    tokenizer = NumberTokenizer()
    adapter = harness_model(model, tokenizer, batch=2, max_new_tokens=4)
    found = lm_eval.simple_evaluate(adapter, tasks=tasks, bootstrap_iters=0)["results"]
    best = []
    for row in rows:
        before = tokenizer.encode(row["q"])
        after = [tokenizer.encode(f" {choice}") for choice in row["choices"]]
        best.append(int(np.argmax([log_p(model, before + ids, len(before)) for ids in after])))
    right = np.mean([choice == row["gold"] for choice, row in zip(best, rows, strict=True)])
    assert found["mine-choice"]["acc,none"] == pytest.approx(right)
    assert found["mine-reply"]["exact_match,none"] == 0
    total = sum(adapter.requests.loglikelihood_rolling([row["q"] for row in rows]))
    words = sum(len(row["q"].split()) for row in rows)
    assert found["mine-text"]["word_perplexity,none"] == pytest.approx(np.exp(-total / words), rel=1e-6)
