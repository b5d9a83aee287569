"""Pages that are made, not written: notebooks with their outputs, what was measured, and every command's help."""

import base64
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds what is made to what is in docs/."""
    made: dict[str, str | bytes] = {"commands.md": commands()}
    for path in sorted(NOTEBOOKS.iterdir()):
        name = f"notebooks/{path.name}"
        if path.suffix == ".ipynb":
            made |= notebook_page(path)
        elif path.suffix in (".md", ".png"):
            made[name] = path.read_bytes() if path.suffix == ".png" else path.read_text(encoding="utf-8")
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def notebook_page(path: Path) -> dict[str, str | bytes]:
    """A notebook as a Markdown page, and its pictures as files beside it."""
    parts, made = [], {}
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for place, output in enumerate(cell.outputs):
            if picture := output.get("data", {}).get("image/png"):
                name = f"{path.stem}-{number}-{place}.png"
                made[f"notebooks/{name}"] = base64.b64decode(picture)
                parts.append(f"![Output of the code above]({name})")
            elif text := said(output):
                parts.append(f"```text\n{text}\n```")
    return made | {f"notebooks/{path.stem}.md": "\n\n".join(parts) + "\n"}


def said(output: NotebookNode) -> str:
    """The text of an output."""
    return (output.get("text") or output.get("data", {}).get("text/plain", "")).rstrip()


def commands() -> str:
    """Every command's help, as the program itself knows it."""
    import typer
    from typer.cli import get_docs_for_click

    from minference_jax.cli.app import app

    program = typer.main.get_command(app)
    return get_docs_for_click(obj=program, ctx=typer.Context(program), name="minference-jax", title="Every command")
