"""What `eval --list` prints: tasks, methods and presets by name."""

from __future__ import annotations


def print_list() -> None:
    """Names with what they stand for, on standard output."""
    from rich import box
    from rich.table import Table

    from minference_jax.cli.console import stdout
    from minference_jax.data import load_text
    from minference_jax.eval.jsonl import INFINITEBENCH, LONGBENCH
    from minference_jax.eval.methods import ABOUT
    from minference_jax.eval.own_data import METRICS
    from minference_jax.eval.tasks import GROUPS, known_tasks
    from minference_jax.patterns import Pattern
    from minference_jax.patterns.files import PRESETS
    from minference_jax.patterns.text import format_pattern

    named: dict[str, list[str]] = {}  # what it is → names: some classes are several tasks
    for name, task in known_tasks(load_text()).items():
        named.setdefault((type(task).__doc__ or "").split("\n\n")[0], []).append(name)
    tasks = {"\n".join(names): text for text, names in named.items()}
    tasks |= {
        "ruler-qa_1\nruler-qa_2": "Questions of a file in SQuAD's format (--qa).",
        "infinitebench": "Files of it (--file), of " + ", ".join(INFINITEBENCH),
        "longbench": "Files of it (--file), of " + ", ".join(LONGBENCH),
        "--data FILE": "Rows of your own, with --template, --answer and --metric " + ", ".join(METRICS),
    }
    presets = {
        name: format_pattern(found) if isinstance(found, Pattern) else "a pattern for each head"
        for name, found in sorted(PRESETS.items())
    }
    sections = {
        "Tasks": tasks,
        "Groups of tasks": {name: ", ".join(members) for name, members in GROUPS.items()},
        "Methods": ABOUT | {"searched:FILE": "a pattern file or preset, its budgets brought to the density"},
        "Presets of patterns": presets,
    }
    console = stdout()
    for title, rows in sections.items():
        table = Table(title=title, box=box.SIMPLE, show_header=False, title_justify="left", pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows.items():
            table.add_row(name, " ".join(text.split()).replace("[", "\\["))
        console.print(table)
