"""Ctrl-C and SIGTERM: the program ends soon, whatever it is at, and says what is kept.

Python looks at signals between its own instructions only, and a prefill is one long call of a compiled program. So a
thread waits a little for the command to end by itself, and then ends the process. Nothing is lost by that: results are
files that are whole at any time, and locks end with their process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from minference_jax.cli.progress import running

PATIENCE = 2.0
"""Seconds that a command has to end by itself."""

WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stopped(BaseException):
    """A signal came. No `KeyboardInterrupt`, which Typer makes an exit status of, without a word."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM raise `Stopped`, and the process ends, at the latest after `PATIENCE`.

    A signal that is ignored, as a shell may have its background jobs ignore SIGINT, stays so. Does nothing in a thread
    other than the main one, which gets all signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    over = threading.Event()
    before = {number: signal.getsignal(number) for number in WORDS}
    for number in WORDS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, _stop)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)


def words(error: BaseException) -> tuple[str, int]:
    """What is said of an interrupted command, and its exit status: 128 and the signal's number."""
    number = error.number if isinstance(error, Stopped) else signal.SIGINT
    return ": ".join([WORDS[number], *getattr(error, "__notes__", ())]), 128 + number


def _stop(number: int, frame: Any) -> None:
    raise Stopped(number)


def _watch(read: int, over: threading.Event) -> None:
    with open(read, "rb", buffering=0) as pipe:
        while numbers := pipe.read(64):
            for number in numbers:
                if number in WORDS and not over.wait(PATIENCE):
                    _end(number)


def _end(number: int) -> None:
    said = ": ".join([WORDS[number], *(work.last_words() for work in running[-1:])])
    bar_away = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # with the cursor, which it hides
    with contextlib.suppress(Exception):  # neither stream may be there any more, and the end comes in any case
        os.write(2, f"{bar_away}error: {said}\n".encode())  # a bar has taken the place of sys.stderr
        sys.stdout.flush()
    os._exit(128 + number)
