"""Runs the PyTorch side in its own process: finds an interpreter that has PyTorch, and never hangs on it."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["TorchError", "TorchNotFoundError", "find_torch_python", "run_torch_jobs"]

ENVIRONMENT_VARIABLE = "MINFERENCE_TORCH_PYTHON"
NEEDED = ("torch", "transformers", "safetensors", "numpy")
INSTALL_HINT = (
    "make an environment for it (Python 3.11 has the small CPU build of PyTorch):\n"
    "    python3.11 -m venv .venv-torch && .venv-torch/bin/pip install torch==2.13.0 transformers safetensors numpy\n"
    f"and pass its interpreter as torch_python, or set {ENVIRONMENT_VARIABLE}"
)


class TorchError(RuntimeError):
    """The PyTorch process failed or took too long; the message ends with what it wrote on standard error."""


class TorchNotFoundError(TorchError):
    """No interpreter with PyTorch and transformers was found."""


def find_torch_python(torch_python: str | Path | None = None) -> Path:
    """The interpreter that runs PyTorch.

    The first of: `torch_python`, the environment variable MINFERENCE_TORCH_PYTHON, `.venv-torch/bin/python` at the root
    of a checkout, and the running interpreter. One that is named but unfit is an error: nothing else is tried.

    Raises:
        TorchNotFoundError: with what is missing and how to install it.
    """
    named = torch_python or os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        reason = _unfit(Path(named))
        if reason:
            where = "torch_python" if torch_python else ENVIRONMENT_VARIABLE
            raise TorchNotFoundError(f"{where}={str(named)!r} {reason}; {INSTALL_HINT}")
        return Path(named)
    root = Path(__file__).parents[2]
    beside = root / ".venv-torch" / "bin" / "python"
    tried = []
    if (root / "pyproject.toml").exists() and beside.exists():
        reason = _unfit(beside)
        if not reason:
            return beside
        tried.append(f"{beside} {reason}")
    # find_spec looks without importing: an installed PyTorch takes seconds to import.
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return Path(sys.executable)
    tried.append(f"{sys.executable} lacks {', '.join(missing)}")
    raise TorchNotFoundError(f"no interpreter with PyTorch was found ({'; '.join(tried)}); {INSTALL_HINT}")


def _unfit(python: Path) -> str | None:
    """Why `python` cannot run the PyTorch side, or None."""
    if not (python.is_file() and os.access(python, os.X_OK)):
        return "is not an executable file"
    code = (
        "import importlib.util as u, json, sys; "
        f"print(json.dumps([sys.version_info[:2] < (3, 11), [n for n in {NEEDED!r} if u.find_spec(n) is None]]))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, env=_environment())
        old, missing = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return f"does not run as a Python interpreter ({error})"
    if old:
        return "is older than Python 3.11"
    return f"lacks {', '.join(missing)}" if missing else None


def _environment() -> dict[str, str]:
    """Ours, less what would make the child look for modules in our environment, and with the network left alone."""
    ours = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")
    }
    return ours | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def run_torch_jobs(
    jobs: Sequence[dict[str, Any]],
    *,
    torch_python: str | Path | None = None,
    timeout: float = 1800.0,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Runs `jobs` (see torch_side.py) one after another in one child process.

    Args:
        jobs: what to do, as torch_side.py describes it.
        torch_python: the interpreter; see `find_torch_python`.
        timeout: seconds after which the child is killed.
        threads: how many threads PyTorch uses; None leaves it to PyTorch.
        progress: called with each line of news.

    Returns:
        The versions of "python", "torch" and "transformers" that ran.

    Raises:
        TorchNotFoundError: if there is no interpreter.
        TorchError: if the child fails or runs out of time.
    """
    python = find_torch_python(torch_python)
    with tempfile.TemporaryDirectory(prefix="minference-torch-") as directory:
        request = Path(directory) / "request.json"
        request.write_text(json.dumps({"threads": threads, "jobs": list(jobs)}))
        # -P keeps this package's folder off the child's module path.
        command = [str(python), "-P", str(Path(__file__).with_name("torch_side.py")), str(request)]
        status = _run(command, Path(directory), timeout, progress)
        tail = "\n".join((Path(directory) / "stderr").read_text(errors="replace").splitlines()[-40:]) or "(nothing)"
        if status is None:
            raise TorchError(f"PyTorch ran for more than {timeout:.0f} s and was stopped; its standard error:\n{tail}")
        if status != 0:
            raise TorchError(f"PyTorch ({python}) ended with status {status}; its standard error:\n{tail}")
        return json.loads(request.with_suffix(".done.json").read_text())


def _run(command: list[str], directory: Path, timeout: float, progress: Callable[[str], None] | None) -> int | None:
    """The exit status of `command`, or None if `timeout` seconds were not enough.

    The child writes to files of `directory`, not to pipes: a pipe that fills up, or that a grandchild keeps open,
    would keep us waiting.
    """
    deadline = time.monotonic() + timeout
    with open(directory / "stdout", "w") as output, open(directory / "stderr", "w") as errors:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=_environment())
    try:
        with open(directory / "stdout", errors="replace") as news:
            unfinished, status = "", None
            while status is None and time.monotonic() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = child.wait(timeout=0.1)
                *lines, unfinished = (unfinished + news.read()).split("\n")
                for line in lines:
                    if progress is not None and line.startswith("progress "):
                        progress(line.removeprefix("progress "))
            return status
    finally:
        # Also when `progress` raises or the user interrupts.
        if child.poll() is None:
            child.kill()
            child.wait()
