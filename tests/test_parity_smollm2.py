"""SmolLM2-135M-Instruct, real weights, on 2,048 tokens of a novel: JAX against PyTorch in float32.

notebooks/03 compares them on 256 tokens, whenever the tests run.
"""

import json

import pytest
from smollm2 import smollm2_directory
from torch_env import torch_python

from minference_jax.compare import run_compare
from minference_jax.data import load_text


@pytest.mark.nightly
def test_float32_logits_argmax_and_greedy_tokens_are_those_of_pytorch(capsys, optimized):
    model, python = smollm2_directory(), torch_python()
    # One thread for PyTorch: two are slower wherever something else needs a core, for they wait for each other.
    code = run_compare(model, load_text(), tokens=2048, as_json=True, torch_python=python, threads=1)
    report = json.loads(capsys.readouterr().out)
    assert (code, report["within_tolerance"], report["failures"]) == (0, True, [])
    assert (report["tokens"], report["positions"], len(report["layers"])) == (2048, 2048, 32)
    assert report["logit_max"] <= 2e-3
    assert report["argmax_agreement"] >= 0.999
    assert report["greedy_ours"] == report["greedy_torch"] and len(report["greedy_torch"][0]) == 64
    assert abs(report["perplexity_ours"] / report["perplexity_torch"] - 1) <= 1e-5
    # A novel, read by a model that knows English: had both read noise, they would agree just as well.
    assert 20 < report["perplexity_torch"] < 50
