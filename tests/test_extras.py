"""The core is enough for the operator; what needs more says which extra brings it."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from minference_jax.extras import EXTRA_OF, naming_extra
from minference_jax.viz.figure import check_path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def named(requirements: list[str]) -> set[str]:
    """The distributions of requirements, as `pyproject.toml` writes them."""
    return {re.split(r"[^\w.-]", one, maxsplit=1)[0].lower().replace("_", "-") for one in requirements}


def test_the_core_is_small():
    """With all that its packages need themselves, at most fifteen are installed."""
    found, todo = set(), named(PROJECT["dependencies"])
    while todo:
        name = todo.pop()
        found.add(name)
        needed = [one for one in metadata.requires(name) or [] if "extra ==" not in one]
        todo |= named(needed) - found
    assert {"jax", "jaxlib", "numpy", "jaxtyping"} <= found
    assert len(found) <= 14  # and this one


def test_packages_are_in_the_extra_that_errors_name():
    for package, extra in EXTRA_OF.items():
        assert named([package]) <= named(EXTRAS[extra]), f"[{extra}] does not install {package}"
    (whole,) = EXTRAS["all"]
    assert {"cli", "eval", "gguf", "models", "plots"} <= set(re.findall(r"\w+", whole))


def test_optional_imports_name_their_extra():
    """Each is written `with naming_extra(...)`, but for the program's, whose entry point does so for all of them."""
    bare = []
    for path in sorted((ROOT / "minference_jax").rglob("*.py")):
        module = path.relative_to(ROOT / "minference_jax")
        if module.parts[0] == "cli" or module.name == "torch_side.py":  # the latter runs where PyTorch was found
            continue
        named_there = set()
        for node in ast.walk(tree := ast.parse(path.read_text())):
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if typing_only or (isinstance(node, ast.With) and "naming_extra" in ast.unparse(node.items[0])):
                named_there |= set(ast.walk(node))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in named_there:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                bare += [f"{module}:{node.lineno} {name}" for name in names if name.split(".")[0] in EXTRA_OF]
    assert not bare


def test_what_is_missing_is_named_and_other_failures_stay_as_they_are():
    needs = r"^a plot needs matplotlib: pip install 'minference-jax\[plots\]'$"
    with pytest.raises(ModuleNotFoundError, match=needs), naming_extra("a plot"):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'of_ours'$"), naming_extra("a plot"):
        raise ModuleNotFoundError("No module named 'of_ours'", name="of_ours")


def test_a_picture_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"^a picture needs matplotlib: pip install"):
        check_path(tmp_path / "speed.png")


CORE_ALONE = """
import importlib.abc, json, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in json.loads(sys.argv[1]):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import jax, minference_jax
from minference_jax.cli import main

q = jax.random.normal(jax.random.key(0), (1, 256, 2, 32))
print(minference_jax.sparse_attention(q, q, q, "vertical-slash:columns=32,tiles=1").shape)
for name in minference_jax.__all__:
    try:
        getattr(minference_jax, name)
    except ModuleNotFoundError as error:
        print(name, error)
print(main(["inspect", "llama-3-8b"]))
"""


def test_the_operator_works_with_the_core_alone():
    """Nothing of the extras is even looked for, until a name is asked for that needs it."""
    command = [sys.executable, "-c", CORE_ALONE, json.dumps(list(EXTRA_OF))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines() == [
        "(1, 256, 2, 32)",
        *[f"{name} a model needs flax: pip install 'minference-jax[models]'" for name in MODELS],
        "1",
    ]
    assert done.stderr == "error: the command line needs typer: pip install 'minference-jax[cli]'\n"


MODELS = ("Llama", "generate", "capture_qkv")
"""Public names that cannot be had without the extra."""
