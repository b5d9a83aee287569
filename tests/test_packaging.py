"""What is in the package, what it imports, and in which direction."""

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each layer imports from those after it only.
LAYERS = (
    ("cli", "__main__"),
    ("demo", "eval", "bench", "compare", "search", "viz", "jobs"),
    ("checkpoints", "text", "planning", "models", "parallel"),
    ("attention",),
    ("patterns",),
    ("index",),
)
HEAVY = ("torch", "matplotlib", "transformers", "typer", "gguf", "rich")


def layer_of(parts: tuple[str, ...]) -> int | None:
    """The layer of `minference_jax.<part>…`; None for what any layer may import, such as data."""
    if parts[0] == "pallas_kernels":
        return len(LAYERS)
    name = parts[1] if len(parts) > 1 else ""
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def imports(path: Path) -> set[tuple[str, ...]]:
    """Every module that a file imports anywhere, functions and `TYPE_CHECKING` blocks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} uses a relative import"
            module = tuple((node.module or "").split("."))
            found |= {(*module, alias.name) for alias in node.names} | {module}
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_no_module_imports_itself_through_others():
    """Imports inside functions and under TYPE_CHECKING count too: they hide a circle, and leave it there."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("minference_jax", "pallas_kernels")
        for path in sources(package)
    }
    names = {module: {".".join(parts) for parts in imports(path)} for module, path in modules.items()}
    # `from package.module import name` names the module and, wrongly, a module of the name: only real ones count.
    after = {module: {name for name in found if name in modules} - {module} for module, found in names.items()}
    for module, found in after.items():
        after[module] = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    while after:
        leaves = [module for module, found in after.items() if not found & set(after)]
        assert leaves, f"import circle among {sorted(after)}"
        for module in leaves:
            del after[module]


@pytest.mark.parametrize("path", sources("minference_jax"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = layer_of(parts)
    if own is None:
        return
    for module in imports(path):
        if module[0] in ("minference_jax", "pallas_kernels"):
            other = layer_of(module)
            assert other is None or other >= own, f"{'.'.join(parts)} imports {'.'.join(module)}"


@pytest.mark.parametrize("path", sources("pallas_kernels"), ids=lambda path: path.name)
def test_kernels_stand_alone(path):
    top = {module[0] for module in imports(path)}
    assert not top & {"minference_jax", "flax", "transformers", "torch", *HEAVY}


def run_python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment).stdout


def test_import_is_fast():
    """Processor time, which other processes on the machine do not stretch; JAX's own import included."""
    code = "import time; s = time.process_time(); import minference_jax; print(time.process_time() - s)"
    assert min(float(run_python(code)) for _ in range(3)) <= 1.5


def test_all_public_names_exist():
    import minference_jax

    for name in minference_jax.__all__:
        assert getattr(minference_jax, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = minference_jax.nothing_like_it


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution, as the build backend makes them."""
    folder = tmp_path_factory.mktemp("dist")
    code = f"import hatchling.build as b; print(b.build_wheel({str(folder)!r})); print(b.build_sdist({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_wheel_holds_both_packages_with_their_data(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    for package in ("minference_jax", "pallas_kernels"):
        assert {str(path.relative_to(ROOT)) for path in sources(package)} <= names
    assert {"minference_jax/data/persuasion.txt", "minference_jax/data/smollm2_135m_instruct.json"} <= names
    assert not [name for name in names if name.startswith("tests/") or "__pycache__" in name]


def test_source_distribution_holds_no_leftovers(built):
    with tarfile.open(built[1]) as archive:
        names = archive.getnames()
    assert [name for name in names if name.endswith("/Makefile")]
    assert not [name for name in names if any(part in name for part in ("__pycache__", ".venv", ".pytest_cache"))]


def find_python(minimum: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["/bin/sh", str(ROOT / ".ci" / "find-python"), minimum]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": "", "HOME": "/nowhere", **environment})


def test_finder_skips_a_shim_that_fails(tmp_path):
    shims = tmp_path / "shims"
    shims.mkdir()
    shim = shims / "python3.12"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    real = tmp_path / "pyenv" / "versions" / "3.12.9" / "bin"
    real.mkdir(parents=True)
    (real / "python").symlink_to(sys.executable)
    found = find_python("3.12", PATH=str(shims), PYENV_ROOT=str(tmp_path / "pyenv"))
    assert found.returncode == 0
    assert Path(found.stdout.strip()).parent == real


def test_finder_says_when_there_is_none():
    missing = find_python("9.9")
    assert missing.returncode == 1
    assert missing.stdout == ""
    assert missing.stderr.startswith("error: no Python 9.9 or newer found")
    wrong = find_python("9.9", PYTHON=sys.executable)
    assert wrong.returncode == 1
    assert f"PYTHON={sys.executable}" in wrong.stderr
