"""One of two processes of two CPU devices each: `HOSTS ALIVE_SECONDS die|sum`. A child process."""

import os
import sys

os.environ["JAX_NUM_CPU_DEVICES"] = "2"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from minference_jax.parallel import make_mesh
from minference_jax.parallel.hosts import join_hosts

if __name__ == "__main__":
    hosts, alive, what = sys.argv[1:]
    join_hosts(hosts, start_seconds=60, alive_seconds=int(alive))
    assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
    if what == "die":
        os._exit(3)
    sharding = NamedSharding(make_mesh(rows=4, heads=1), PartitionSpec("rows"))
    x = jax.make_array_from_callback((4,), sharding, lambda index: np.arange(4, dtype=np.float32)[index])
    print(float(jnp.sum(x)), flush=True)
    os._exit(0)  # without a farewell to a process that is gone
