"""The examples of README and docs do what they say; their commands exist, and their links lead somewhere.

`make docs` says whether the site can be built, and whether its links lead somewhere.
"""

import re
import shlex
from pathlib import Path

import pytest
import typer
from smollm2 import smollm2_directory

from minference_jax.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
SCRIPT = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXAMPLES = SCRIPT.findall(README)
# A backslash joins lines; `srun … minference-jax` is a command too.
LINES = "\n".join((README, *PAGES.values())).replace("\\\n", " ")
COMMANDS = re.findall(r"^(?:srun .*)?minference-jax (.*?)(?:  +#.*)?$", LINES, re.MULTILINE)


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


SAID = {
    "choose-a-rule.md": "2048 dense\n",
    "gradients.md": "(1, 256, 2, 16) (1, 256, 1, 16) True\n(64, 16)\n",
    "many-gpus.md": "(1, 64, 64) True\n(1, 512, 4, 16)\n",
    "save-and-restore.md": "True\nTrue\n",
    "tour.md": "(1, 1024, 4, 64) xla\n",
    "write-an-index.md": "(1, 256, 2, 16)\nTrue\n",
    "your-own-model.md": "(1, 256, 32)\n(1, 256, 32)\nTrue\n",
}
"""What the examples of a page print, or begin to."""


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if SCRIPT.search(text)])
def test_the_examples_of_a_page_do_what_it_says(page, tmp_path, monkeypatch, capsys):
    """One after another, as a reader who pastes them into one session."""
    monkeypatch.chdir(tmp_path)
    session = {"__name__": "__main__"}
    for example in SCRIPT.findall(PAGES[page]):
        if "fetch_demo_model" in example:
            assert example in EXAMPLES  # run by the test above
        else:
            exec(compile(example, page, "exec"), session)
    assert capsys.readouterr().out.startswith(SAID[page])


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


def test_commands_of_a_page_keep_jobs_in_files_of_their_own():
    for text in (README, *PAGES.values()):
        files = re.findall(r"^minference-jax .* --out (\S+)", text, re.MULTILINE)
        assert len(set(files)) == len(files)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []
