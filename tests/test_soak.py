"""Many calls of `generate` in one process: no memory that stays, no compilation, and the answers of a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from soak import Soak, resident_bytes


# `warm`: conversations until every program is compiled and the allocator has what it needs.
@pytest.mark.parametrize(
    "calls, kinds, warm",
    [(30, 2, 24), pytest.param(300, 6, 150, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)])],
)
def test_soak(calls, kinds, warm):
    soak, compiled = Soak(kinds), []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    for number in range(warm):
        list(soak.conversation(number))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        before, arrays = resident_bytes(), len(jax.live_arrays())
        found = dict(soak.answers(calls, warm))
        grown = resident_bytes() - before
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    assert len(jax.live_arrays()) == arrays
    assert grown < 0.01 * before, f"{grown} bytes more after {calls} calls"
    assert any(None in answers for answers in found.values())  # some were cancelled
    assert any(len(answers) > 1 for answers in found.values())  # some were continued

    root = Path(__file__).parents[1]
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=f"{root}:{root / 'tests'}")
    command = [sys.executable, str(root / "tests" / "soak.py"), *map(str, (warm, warm + len(found), kinds))]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert {int(number): answers for number, answers in json.loads(run.stdout).items()} == found
