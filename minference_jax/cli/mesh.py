"""`--mesh` and `--hosts`: the devices that share a command's work."""

from __future__ import annotations

import os
import sys
from typing import Any

from minference_jax.cli.console import usage, usage_error

MESH_HELP = "Devices that share the work: heads=8, or rows=2,heads=8 for more devices than KV heads."
HOSTS_HELP = "With --mesh on several hosts: auto (Slurm, Open MPI, Kubernetes) or ADDRESS:PORT,PROCESSES,ID."


def start_mesh(mesh: str, hosts: str = "", config: Any = None) -> Any:
    """The mesh that the options mean, None without `mesh`; with `hosts`, this process first joins the others.

    To be called before anything else of JAX. Of several processes only the first writes to standard output. With a
    `config` (or `check_mesh` later), a mesh that does not fit it ends the program with status 2.
    """
    if not mesh:
        if hosts:
            raise usage_error("--hosts needs --mesh")
        return None
    from minference_jax.parallel.mesh import make_mesh, parse_mesh

    with usage("--mesh"):
        sizes: dict[str, Any] = {**parse_mesh(mesh)}
    if hosts:
        import jax

        from minference_jax.parallel.hosts import join_hosts

        with usage("--hosts"):
            join_hosts(hosts)
        if jax.process_index() > 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with usage("--mesh"):
        return make_mesh(**sizes, config=config)


def check_mesh(mesh: Any, config: Any) -> None:
    """Ends the program with status 2 where the mesh does not fit the model."""
    from minference_jax.parallel.mesh import fitted

    if mesh is not None:
        with usage("--mesh"):
            fitted(mesh, config)
