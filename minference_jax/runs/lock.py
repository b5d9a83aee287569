"""One process at a time on an output: a lock that ends with its holder, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class LockedError(RuntimeError):
    """Another process works on the same output; the message names its process id."""


@contextlib.contextmanager
def locked(path: str | Path, *, wait: bool = False, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds the lock of the output `path` for the time of a `with` block.

    The lock is the operating system's, on a file beside it (`path` with the suffix `.lock`) that holds the process id.
    It ends with the process that holds it: what a killed process leaves behind is an unlocked file, which blocks
    nobody. It counts within a process too, so two threads can't hold it both.

    **Arguments:**

    - `wait`: wait until the holder is done, instead of an error. `say` then gets one line that names the holder.

    **Raises:** `LockedError` with the holder's process id. `OSError` naming the file where it can't be made or the file
    system has no locks.
    """
    beside = Path(path).with_name(Path(path).name + ".lock")
    beside.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(beside, path, wait, say)
    try:
        yield
    finally:
        beside.unlink(missing_ok=True)  # while it is still ours
        os.close(descriptor)


def _acquire(beside: Path, path: str | Path, wait: bool, say: Callable[[str], None] | None) -> int:
    while True:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _try_lock(descriptor, beside):
                holder = f"{path} is in use by {_holder(descriptor)}"
                if not wait:
                    raise LockedError(f"{holder}: wait for it, or name another output")
                if say is not None:
                    say(f"{holder}: waiting")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The one before may have deleted the file between our opening and locking it.
            if _is_still(beside, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int, beside: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(error.errno, "the file system has no locks", str(beside)) from None
        raise OSError(error.errno, error.strerror, str(beside)) from None
    return True


def _is_still(beside: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(beside), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    for _ in range(10):  # it writes its id right after it got the lock
        if words := os.pread(descriptor, 300, 0).decode(errors="replace").split():
            host = f" on {words[1]}" if len(words) > 1 and words[1] != socket.gethostname() else ""
            return f"process {words[0]}{host}"
        time.sleep(0.01)
    return "another process"
