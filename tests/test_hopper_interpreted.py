"""The Hopper kernel's own logic, run on a CPU by the Mosaic GPU interpreter against the oracle, with race detection."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("hopper_interpreted.py")

CASES = {
    "every-part-two-sequences-offset-D64": {
        "b": 2, "t": 140, "s": 300, "n": 2, "k": 1, "h": 64, "dtype": "bfloat16",
        "lengths": [260, 100], "q_offset": 128, "widths": {"columns": 40, "bands": 3, "blocks": 3},
        "config": {"lanes": 2, "chain": 2},
    },
    # Running maxima grow. One thread block for all query tiles, those of no step and of one step among them: what runs
    # ahead must not wait for what comes behind it.
    "one-chain-T261-D96-fp16": {
        "b": 2, "t": 261, "s": 261, "n": 1, "k": 1, "h": 96, "dtype": "float16",
        "lengths": [261, 130], "q_offset": 0, "scale": 1.0, "widths": {"columns": 70, "bands": 2, "blocks": 1},
        "config": {"lanes": 1, "chain": None, "polynomial_tiles": 4},
    },
    "no-overlap": {
        "b": 1, "t": 130, "s": 260, "n": 1, "k": 1, "h": 64, "dtype": "bfloat16",
        "lengths": [250], "q_offset": 128, "widths": {"columns": 70, "bands": 2, "blocks": 1},
        "config": {"overlap": False, "lanes": 1},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_interpreted_kernel_agrees_and_is_free_of_races(case):
    path = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")])
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=path)
    command = [sys.executable, "-W", "ignore", str(SCRIPT), json.dumps({**case, "seed": 1})]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "agrees" in run.stdout
    assert "RACE" not in run.stdout + run.stderr
