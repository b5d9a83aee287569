"""How far a command is: a bar on a terminal, a line now and then elsewhere, and a word on what is kept at its end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from minference_jax.cli.console import stderr

FIRST_LINE, OTHER_LINES = 10.0, 30.0
"""Seconds before the first line where there is no terminal, and between the others."""


def _nothing() -> None:
    """Where there is no bar."""


running: list[Work] = []
"""What the program is at; the last one is the innermost."""


class Work:
    """A piece of work. Called as `work(done, total)`.

    - `label`: what it is. `keeps`: where what is done lies if it is stopped. `unit`: of what is done, where a run goes
      on from another's: a first call with some done says so.
    """

    def __init__(self, label: str, keeps: str = "", unit: str = ""):
        self.label, self.keeps, self.unit = label, keeps, unit
        self.done, self.total, self.started = 0, 0, time.monotonic()
        self.first = 0
        self.over = threading.Event()
        self._bar, self._draw = contextlib.ExitStack(), _nothing

    def __call__(self, done: int, total: int) -> None:
        """So many of so many are done."""
        if not self.total and done and self.unit:
            self.first = done
            stderr().print(f"resuming: {done:,} {self.unit} kept", markup=False)
        self.done, self.total = done, total
        self._draw()

    def becomes(self, label: str) -> None:
        """Ends the bar, so that the command may write to the terminal; the work goes on under another name."""
        self.over.set()
        self._draw = _nothing
        self._bar.close()
        self.label, self.done, self.total = label, 0, 0

    def line(self) -> str:
        """How far it is, such as "Evaluating: 7 of 14, 65 s, about 60 s left"."""
        spent = time.monotonic() - self.started
        parts = [f"{self.done:,} of {self.total:,}"] if self.total else []
        parts.append(f"{spent:.0f} s")
        if self.first < self.done < self.total:
            parts.append(f"about {spent * (self.total - self.done) / (self.done - self.first):.0f} s left")
        return f"{self.label}: {', '.join(parts)}"

    def last_words(self) -> str:
        """What is said when it is stopped."""
        far = f", {self.done:,} of {self.total:,}" if self.total else ""
        kept = f"what is done is in {self.keeps}, and the same command goes on there" if self.keeps else ""
        return f"{self.label}{far}; {kept or 'nothing is kept'}"

    def show(self) -> None:
        """Starts the bar, or the lines."""
        console = stderr()
        if not console.is_terminal:
            threading.Thread(target=self._tell, daemon=True).start()
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        bars = Progress(*columns, console=console, transient=True)
        self._bar.callback(bars.stop)  # first, as a signal may come at any time
        bars.start()
        task = bars.add_task(self.label, total=None)
        self._draw = lambda: bars.update(task, completed=self.done, total=self.total or None)

    def _tell(self) -> None:
        wait = FIRST_LINE
        while not self.over.wait(wait):
            stderr().print(self.line(), markup=False)
            wait = OTHER_LINES


@contextlib.contextmanager
def progress(label: str, *, keeps: str = "", unit: str = "") -> Iterator[Work]:
    """Work within a `with` block, shown on standard error: a bar, or where there is no terminal a line after ten
    seconds and every thirty then. Where the block is interrupted, the exception carries what is kept."""
    work = Work(label, keeps, unit)
    running.append(work)
    try:
        work.show()
        yield work
    except BaseException as error:
        if not isinstance(error, Exception):
            error.add_note(work.last_words())
        raise
    finally:
        work.becomes(label)
        running.remove(work)
