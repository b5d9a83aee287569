"""Several processes, one on each host, that run one program together.

Every process runs the same command. JAX joins their devices into one list, of which a mesh is made; each process loads
the slices of its own devices, and all give the same results. A process that does not come, or that dies, ends the
others with an error after a while: they wait for nothing longer than that.
"""

from __future__ import annotations

from typing import Any

import jax

START_SECONDS = 300
"""How long a process waits for the others to start."""
ALIVE_SECONDS = 60
"""After so long without a sign of life of one process, the others end."""


def join_hosts(hosts: str = "auto", *, start_seconds: int = START_SECONDS, alive_seconds: int = ALIVE_SECONDS) -> None:
    """Makes this process one of several. To be called before anything else of JAX.

    **Arguments:** `hosts`: "auto" under Slurm, Open MPI or Kubernetes, which say who is who; otherwise
    "ADDRESS:PORT,PROCESSES,ID": where the first process listens, how many there are, and which of them (from 0) this
    one is. `start_seconds`, `alive_seconds`: how long to wait for the start and for a sign of life of the others.

    Raises `ValueError` for another text, and `RuntimeError` where the others do not come in time.
    """
    options: dict[str, Any] = {"initialization_timeout": start_seconds, "heartbeat_timeout_seconds": alive_seconds}
    if hosts != "auto":
        address, processes, place = _parsed(hosts)
        options |= {"coordinator_address": address, "num_processes": processes, "process_id": place}
    if "cpu" in (jax.config.jax_platforms or "cpu").split(","):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        raise ValueError(f"hosts={hosts!r}: {error}; give ADDRESS:PORT,PROCESSES,ID") from None


def _parsed(hosts: str) -> tuple[str, int, int]:
    parts = hosts.split(",")
    numbers = [int(part) for part in parts[1:] if part.isdecimal()]
    if len(parts) != 3 or len(numbers) != 2 or ":" not in parts[0] or not numbers[1] < numbers[0]:
        raise ValueError(f"hosts must be auto or ADDRESS:PORT,PROCESSES,ID with ID below PROCESSES, got {hosts!r}")
    return parts[0], numbers[0], numbers[1]
