"""The recall bench on a random model, and that nothing is compiled anew for every layer or number of lines."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy_llama import random_llama

from minference_jax import LlamaConfig, PerTile, VerticalSlash, capture_qkv, make_plan
from minference_jax.bench.recall import Row, as_dense, lines_as_dense, mean_density, measure, near_a_quarter
from minference_jax.index import recall as recall_module
from minference_jax.patterns import vertical_slash


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(61, 32, 40, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
    return random_llama(config)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 520)), jnp.int32)


def counted(monkeypatch, module, name):
    """A list that grows with each call of a function of a module.

    A program that is compiled already calls the function no more: a test that counts needs a pattern or a number of
    tokens that no other test has.
    """
    calls, function = [], getattr(module, name)

    def wrapper(*arguments, **keywords):
        calls.append(name)
        return function(*arguments, **keywords)

    monkeypatch.setattr(module, name, wrapper)
    return calls


def test_rows_are_those_of_each_layer(model, tokens, monkeypatch):
    traced, tokens = counted(monkeypatch, recall_module, "visited_keys"), tokens[:, :258]
    patterns = {"ours": VerticalSlash(26, tiles=1, probes="spread", threshold=1e-3), "lines": VerticalSlash(16, 101)}
    rows = measure(model, tokens, patterns)
    assert len(traced) == len(patterns)  # not once more for each of the three layers
    assert [row.name for row in rows] == list(patterns)
    for index, (q, k, _) in enumerate(capture_qkv(model, tokens)):
        for row, pattern in zip(rows, patterns.values(), strict=True):
            expected = recall_module.recall(q, k, make_plan(q, k, pattern))[0]
            np.testing.assert_allclose(row.recall[index], expected, atol=1e-6)
    assert "lines" in str(rows[1])


def test_lines_reach_the_density_with_one_program(model, tokens, monkeypatch):
    sample = [(q, k) for q, k, _ in capture_qkv(model, tokens)]
    traced = counted(monkeypatch, vertical_slash, "vertical_slash_index")
    found = lines_as_dense(sample, 16, 0.9)
    assert len(traced) == 1
    assert abs(mean_density(sample, found) - 0.9) < 0.03  # a line is worth up to 0.025 here


def test_threshold_reaches_the_density_with_one_program(model, tokens, monkeypatch):
    sample = [(q, k) for q, k, _ in capture_qkv(model, tokens)]
    pattern = VerticalSlash(columns=8, tiles=1, probes="spread", threshold=2e-3)
    traced = counted(monkeypatch, vertical_slash, "vertical_slash_index")
    found = as_dense(sample, pattern, 0.6)
    assert len(traced) == 1
    assert abs(mean_density(sample, found) - 0.6) < 0.003


def test_our_rule_is_in_proportion():
    assert near_a_quarter(4096) == PerTile(8, 0.7 / 4096, 1024, 111)
    assert near_a_quarter(65536).columns == 3200
    assert near_a_quarter(65536).probes == "spread"


def test_comparison_counts_the_heads_that_lose():
    ours = Row("ours", 0.25, np.array([[0.955, 0.93], [0.88, 0.99]]))
    other = Row("other", 0.25, np.array([[0.85, 0.935], [0.90, 0.97]]))
    assert str(ours) == "ours | 0.250 | 0.9387 | 75% | 50% | 0.88, 0.93, 0.95"
    assert ours.against(other) == "+2.50 | +0 | 50% (25% by more than a point) | -2.0, -0.5, +2.0"
