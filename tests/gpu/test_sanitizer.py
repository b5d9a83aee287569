"""The attention kernels under compute-sanitizer: no access out of bounds (memcheck), no race (racecheck)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.device import Device
from pallas_kernels.hopper.attention import CAPABILITIES
from pallas_kernels.mma.config import BLOCK_SHARED_MEMORY

pytestmark = pytest.mark.gpu

DEVICE = Device.default()
if DEVICE.platform != "gpu" or DEVICE.version not in BLOCK_SHARED_MEMORY:
    pytest.skip(f"needs a GPU that the kernels serve: {DEVICE}", allow_module_level=True)

KERNELS = ["mma", *(["hopper"] if DEVICE.capability in CAPABILITIES else [])]
SANITIZER = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("tool", "clean"), [("memcheck", "ERROR SUMMARY: 0 errors"), ("racecheck", "0 hazards displayed")]
)
def test_sanitizer_finds_nothing(tool, clean, kernel):
    settings = {
        "XLA_FLAGS": "--xla_gpu_enable_command_buffer=",  # kernels launched one by one, which the filter can name
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # most of the memory belongs to the process of these tests
    }
    command = [
        str(SANITIZER),
        f"--tool={tool}",
        # XLA starts ptxas as a child: compute-sanitizer 2025.3 crashes when it follows it.
        "--target-processes=application-only",
        "--kernel-name=kernel_substring=sparse_attention",
        sys.executable,
        "-m",
        "tests.gpu.sanitized",
        kernel,
    ]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=240, check=False
    )
    assert "ran to its end" in ran.stdout, ran.stdout + ran.stderr
    assert clean in ran.stdout, ran.stdout
