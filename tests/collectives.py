"""What a prefill of a million tokens sends on 8 devices, counted in its lowered program. A child process.

    python tests/collectives.py compile

compiles the program for 8 GPUs that are not here instead, with what `compile_gpus.py` needs, and says what each holds.
"""

import os
import re
import sys
import time
from collections import Counter

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
if "compile" in sys.argv:
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from minference_jax.checkpoints.presets import CONFIGS
from minference_jax.models import programs
from minference_jax.models.forward import CHUNK
from minference_jax.models.params import param_shapes
from minference_jax.parallel import make_mesh
from minference_jax.parallel.exchange import Exchange
from minference_jax.parallel.mesh import abstract_mesh
from minference_jax.parallel.specs import param_specs
from minference_jax.patterns import HeadPatterns
from minference_jax.planning.auto import auto_pattern
from minference_jax.planning.memory import memory_need

TOKENS = 1 << 20


def lowered(config, exchange):
    """The prefill, lowered; nothing of the model's size is allocated."""
    specs = param_specs(config, exchange.mesh)

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(exchange.mesh, spec))

    params = {name: struct(shape, jnp.bfloat16, specs[name]) for name, shape in param_shapes(config).items()}
    patterns = HeadPatterns.uniform(auto_pattern(TOKENS), config.num_layers, config.num_heads).arrays()
    patterns = jax.tree.map(lambda x: struct(x.shape, x.dtype, PartitionSpec(None, "heads")), patterns)
    tokens, lengths = struct((1, TOKENS), jnp.int32, PartitionSpec()), struct((1,), jnp.int32, PartitionSpec())
    settings = {"rows_at_once": CHUNK, "implementation": None, "return_info": False, "exchange": exchange}
    inputs = (params, patterns, tokens, lengths, lengths, None, None)
    return programs.PREFILL.form(params, exchange).lower(config, *inputs, **settings)


def collectives(text: str) -> Counter:
    """(operation, shape and dtype of its operand) → how often it is in the program."""
    found: Counter = Counter()
    names = r"stablehlo\.(all_to_all|all_gather|all_reduce|reduce_scatter|collective_\w+)"
    for match in re.finditer(rf'"{names}"', text):
        operand = re.compile(r" : \(tensor<([^>]*)>\) ->").search(text, match.end())
        assert operand is not None
        found[match[1], operand[1]] += 1
    return found


def compile_for_gpus(config) -> None:
    """For 8 GPUs of compute capability 9.0."""
    from compile_gpus import topology_of

    from pallas_kernels.device import lowering_for

    devices = topology_of("9.0", 8).devices
    with lowering_for("9.0"):
        program = lowered(config, Exchange(make_mesh(heads=8, devices=devices)))
        started = time.perf_counter()
        memory = program.compile().memory_analysis()
    assert memory is not None
    held = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    print(f"{time.perf_counter() - started:.1f} s; GiB of arguments and temporary: {[size / 2**30 for size in held]}")
    print("predicted", memory_need(config, tokens=TOKENS, cache=None, mesh=abstract_mesh("heads=8", config)))


if __name__ == "__main__":
    llama = CONFIGS["llama-3-8b"]
    if "compile" in sys.argv:
        compile_for_gpus(llama)
    else:
        for key, count in sorted(collectives(lowered(llama, Exchange(make_mesh(heads=8))).as_text()).items()):
            print(*key, count)
