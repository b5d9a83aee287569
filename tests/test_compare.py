"""Comparing two runs by hand-made numbers, and the child process when it fails, hangs or is missing."""

import dataclasses
import json
import math
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_env import torch_python
from variants import VARIANTS

from minference_jax.compare import (
    Comparison,
    Outputs,
    Tolerance,
    TorchError,
    TorchNotFoundError,
    api,
    comparison_table,
    find_torch_python,
)
from minference_jax.compare import torch_process as process
from minference_jax.compare.comparison import compare_outputs
from minference_jax.compare.outputs import write_inputs

TOKENS = np.array([[3, 1, 2, 0], [2, 1, 0, 0]], np.int32)
LENGTHS = np.array([4, 2], np.int32)


def outputs(logits, hidden, greedy=((1, 2, 3), (1, 2, 3))):
    """Outputs whose per-position arrays follow from `logits` [b, t, vocab]."""
    logits = np.asarray(logits, np.float32)
    following = np.roll(TOKENS, -1, axis=1)[..., None]
    two = np.sort(logits, axis=-1)[..., -2:]
    return Outputs(
        hidden=np.asarray(hidden, np.float32),
        logits=logits,
        argmax=logits.argmax(-1).astype(np.int32),
        margin=two[..., 1] - two[..., 0],
        logsumexp=np.log(np.exp(logits).sum(-1)),
        next_logit=np.take_along_axis(logits, following, axis=-1)[..., 0],
        greedy=np.asarray(greedy, np.int32),
        seconds={"load": 0.5, "prefill": 1.0, "decode": 2.0},
    )


def compared(ours, theirs, **changes) -> Comparison:
    about = {"model": "m", "dtype": "float32", "patterns": None, "versions": {"jax": "1"}, "tolerance": Tolerance()}
    return compare_outputs(ours, theirs, tokens=TOKENS, lengths=LENGTHS, positions=range(4), **about | changes)


@pytest.fixture
def base(rng):
    return rng.standard_normal((2, 4, 5)), rng.standard_normal((2, 3, 4, 6))


def test_equal_runs_have_no_difference_and_uniform_logits_have_perplexity_vocab(base):
    _, hidden = base
    run = outputs(np.zeros((2, 4, 5)), hidden)
    result = compared(run, run, tolerance=Tolerance.default("float32"))
    assert (result.logit_max, result.logit_rms, result.kl, result.argmax_agreement) == (0, 0, 0, 1)
    assert result.perplexity_ours == pytest.approx(5)
    assert [layer.name for layer in result.layers] == ["embedding", "layer 0", "final norm"]
    assert result.within_tolerance and result.greedy_agreement == 1 and result.tokens == result.positions == 6


def test_differences_are_max_and_rms_over_valid_positions(base):
    logits, hidden = base
    changed_logits, changed_hidden = logits.copy(), hidden.copy()
    changed_logits[0, 1, 2] += 3.0
    changed_logits[1, 3] = 80  # row 1 has 2 tokens: this is padding
    changed_hidden[1, 2, 0, :] += 0.5
    changed_hidden[1, 2, 3, :] += 7.0  # padding
    result = compared(outputs(changed_logits, changed_hidden), outputs(logits, hidden))
    assert result.logit_max == pytest.approx(3, rel=1e-5)
    assert result.logit_rms == pytest.approx(math.sqrt(9 / (6 * 5)), rel=1e-5)
    assert [layer.max for layer in result.layers] == pytest.approx([0, 0, 0.5], abs=1e-6)
    assert result.layers[2].rms == pytest.approx(0.5 * math.sqrt(1 / 6), rel=1e-5)


def test_kl_of_two_distributions_by_hand():
    theirs = np.log([[[0.5, 0.25, 0.125, 0.0625, 0.0625]] * 4] * 2)
    ours = np.log([[[0.25, 0.5, 0.125, 0.0625, 0.0625]] * 4] * 2)
    result = compared(*(outputs(logits, np.zeros((2, 3, 4, 6))) for logits in (ours, theirs)))
    assert result.kl == pytest.approx(0.25 * math.log(2), rel=1e-6)


def test_argmax_and_greedy_agreement(base):
    logits, hidden = base
    logits[0, 2] = [0, 0, 4, 3, 0]
    changed = logits.copy()
    changed[0, 2] = [0, 0, 4, 4.5, 0]
    result = compared(
        outputs(changed, hidden, [[1, 2, 3], [1, 9, 3]]),
        outputs(logits, hidden),
        tolerance=Tolerance(argmax=0.9, greedy=True),
    )
    assert result.argmax_agreement == pytest.approx(5 / 6)
    assert result.largest_lost_margin == pytest.approx(1)
    # Row 1 agrees for its first token only: what follows a difference is another text.
    assert result.greedy_agreement == pytest.approx((1 + 1 / 3) / 2)
    assert len(result.failures) == 2


def test_nan_is_never_within_tolerance(base):
    logits, hidden = base
    broken = logits.copy()
    broken[0, 0, 0] = np.nan
    result = compared(outputs(broken, hidden), outputs(logits, hidden), tolerance=Tolerance(logit_max=1e9))
    assert not result.within_tolerance


def test_report_and_json_have_the_figures(base):
    from rich.console import Console

    logits, hidden = base
    result = compared(outputs(logits + 1e-3, hidden), outputs(logits, hidden), tolerance=Tolerance.default("float32"))
    assert json.loads(json.dumps(result.to_dict()))["logit_max"] == pytest.approx(1e-3, rel=1e-2)
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(comparison_table(result))
    text = console.export_text()
    for words in ("max |logit difference|", "layer 0", "perplexity, PyTorch", "Within tolerance"):
        assert words in text


def test_a_missing_interpreter_says_how_to_get_one(tmp_path, monkeypatch):
    with pytest.raises(TorchNotFoundError, match="is not an executable file"):
        find_torch_python(tmp_path / "python")
    monkeypatch.setenv("MINFERENCE_TORCH_PYTHON", str(tmp_path))
    with pytest.raises(TorchNotFoundError, match=r"MINFERENCE_TORCH_PYTHON=(.|\n)*pip install torch"):
        find_torch_python()


def test_an_interpreter_without_torch_is_named_with_what_it_lacks(monkeypatch):
    monkeypatch.setattr(process, "NEEDED", ("json", "no_such_module"))
    with pytest.raises(TorchNotFoundError, match="lacks no_such_module"):
        find_torch_python(sys.executable)


def fake_torch_side(tmp_path, monkeypatch, code):
    """Runs `code` in the place of torch_side.py, under this interpreter."""
    (tmp_path / "torch_side.py").write_text("import json, sys, time, pathlib\n" + code)
    monkeypatch.setattr(process, "__file__", str(tmp_path / "torch_process.py"))
    monkeypatch.setattr(process, "NEEDED", ("json",))
    return {"jobs": [], "torch_python": sys.executable}


def test_progress_lines_are_passed_on(tmp_path, monkeypatch):
    done = "pathlib.Path(sys.argv[1]).with_suffix('.done.json').write_text('{}')"
    call = fake_torch_side(tmp_path, monkeypatch, f"print('noise'); print('progress half', flush=True); {done}")
    news = []
    assert process.run_torch_jobs(**call, progress=news.append) == {}
    assert news == ["half"]


def test_a_failing_child_shows_its_standard_error(tmp_path, monkeypatch):
    call = fake_torch_side(tmp_path, monkeypatch, "raise KeyError('the reason')")
    with pytest.raises(TorchError, match=r"status 1; its standard error:\n(.|\n)*the reason"):
        process.run_torch_jobs(**call)


def test_a_hanging_child_is_stopped(tmp_path, monkeypatch):
    call = fake_torch_side(tmp_path, monkeypatch, "print('stuck', file=sys.stderr, flush=True); time.sleep(60)")
    started = time.monotonic()
    with pytest.raises(TorchError, match=r"more than 2 s and was stopped(.|\n)*stuck"):
        process.run_torch_jobs(**call, timeout=2)
    assert time.monotonic() - started < 20


def test_a_checkpoint_that_lacks_tensors_is_an_error_not_random_tensors(tmp_path):
    """transformers alone would fill the gap with random numbers and print a warning."""
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS["gqa4"]))
    save_file(
        {"model.embed_tokens.weight": np.ones((331, 64), np.float32)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_inputs(tmp_path, TOKENS, LENGTHS)
    run = {"kind": "run", "model": str(tmp_path), "output": str(tmp_path), "dtype": "float32", "attention": "sdpa"}
    run |= {"device": "cpu", "positions": [0], "layers": True, "new_tokens": 0, "chunk": 64}
    with pytest.raises(TorchError, match=r"missing_keys(.|\n)*layers.1.self_attn.k_proj"):
        process.run_torch_jobs([run], torch_python=torch_python(), threads=1)


def test_the_command_reports_and_its_status_says_whether_all_is_within_tolerance(base, tmp_path, monkeypatch, capsys):
    logits, hidden = base
    near, far = (compared(outputs(logits + d, hidden), outputs(logits, hidden)) for d in (1e-4, 1.0))
    within, outside = (dataclasses.replace(c, tolerance=Tolerance.default("float32")) for c in (near, far))
    monkeypatch.setattr(process, "NEEDED", ("json",))
    monkeypatch.setattr("minference_jax.text.tokenizer.load_tokenizer", lambda path: CharacterTokenizer())
    calls = []
    for result, status in ((within, 0), (outside, 1)):
        monkeypatch.setattr(api, "compare", lambda *args, r=result, **options: calls.append((args, options)) or r)
        assert api.run_compare("m", "abcdef", tokens=4, as_json=True, torch_python=sys.executable) == status
        assert json.loads(capsys.readouterr().out)["within_tolerance"] == (status == 0)
        assert api.run_compare("m", "abcdef", tokens=9, torch_python=sys.executable) == status
        captured = capsys.readouterr()
        assert "Logits and tokens" in captured.out and "6 tokens, fewer than 9" in captured.err
    assert [len(args[1]) for args, _ in calls] == [4, 6, 4, 6]
    assert calls[0][1]["torch_python"] == sys.executable
    with pytest.raises(ValueError, match="tokens must be at least 2"):
        api.run_compare("m", "a", tokens=1, torch_python=sys.executable)


class CharacterTokenizer:
    def encode(self, text):
        return [ord(character) for character in text]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16, got 'float64'"),
        ({"device": "tpu"}, "device must be one of cpu, cuda"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ({"prompt": [1, 331]}, r"outside 0..330: 1 to 331"),
        ({"prompt": [[1.0]]}, r"integers \[t\] or \[b, t\], got float64"),
        ({"prompt": [[1, 2]], "lengths": [3]}, "lengths must be 1 numbers from 1 to 2"),
        ({"positions": [0, 3]}, r"positions must lie in 0..2, got 0 to 3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused_before_pytorch_is_started(tmp_path, monkeypatch, options, message):
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS["gqa4"]))
    save_file({"model.norm.weight": np.ones(64, np.float32)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(process, "NEEDED", ("json",))
    with pytest.raises(ValueError, match=message):
        api.compare(tmp_path, options.pop("prompt", [3, 1, 2]), torch_python=sys.executable, **options)


def test_positions_of_a_long_prompt_are_spread_evenly_from_first_to_last():
    positions = api._positions(None, 10_000)
    assert len(positions) == len(set(positions)) == 2048 and (positions[0], positions[-1]) == (0, 9999)
    assert set(np.diff(positions)) == {4, 5}
    assert api._positions(None, 3) == [0, 1, 2]
