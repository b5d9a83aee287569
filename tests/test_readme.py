"""The README's examples do what they say, as scripts of their own; its commands exist, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from smollm2 import smollm2_directory

from minference_jax.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^minference-jax (.*?)(?:  +#.*)?$", README, re.MULTILINE)


def test_a_long_text_is_read_with_a_sparse_plan(tmp_path, monkeypatch, capsys, optimized):
    (example,) = (text for text in EXAMPLES if "Llama.from_pretrained" in text)
    folder = re.search(r'fetch_demo_model\("(.+?)"\)', example)
    assert folder is not None
    # The model is there already, so that this test downloads nothing.
    link = tmp_path / folder[1]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(smollm2_directory())
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    told, text = capsys.readouterr().out.split("\n", 1)
    density, recall = map(float, re.findall(r"0\.\d+", told))
    assert 0.2 < density < 0.5 < 0.8 < recall < 1
    assert len(text.split()) > 5


def test_the_attention_alone_is_a_call_on_arrays(capsys):
    (example,) = (text for text in EXAMPLES if "jax.random" in text)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == "(1, 1024, 4, 64)\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_takes_what_it_names(command):
    """Arguments are parsed, with nothing run."""
    name, *arguments = shlex.split(command)
    context, found = typer.Context(typer.main.get_command(app)), typer.main.get_command(app)
    while hasattr(found, "commands"):  # bench is a group
        found = found.commands[name]
        if hasattr(found, "commands"):
            name, *arguments = arguments
    assert found.make_context(name, arguments, parent=context).params


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []
