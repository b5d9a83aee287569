"""What a prefill of a million tokens sends on 8 devices, counted in its lowered program. A child process."""

import os
import re
import sys
from collections import Counter

os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from minference_jax.checkpoints.presets import CONFIGS
from minference_jax.models import programs
from minference_jax.models.forward import CHUNK
from minference_jax.models.params import param_shapes
from minference_jax.parallel import make_mesh
from minference_jax.parallel.exchange import Exchange
from minference_jax.parallel.specs import param_specs
from minference_jax.patterns import HeadPatterns
from minference_jax.planning.auto import auto_pattern

TOKENS = 1 << 20


def lowered(config, exchange) -> str:
    """StableHLO of the prefill; nothing of the model's size is allocated."""
    specs = param_specs(config, exchange.mesh)

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(exchange.mesh, spec))

    params = {name: struct(shape, jnp.bfloat16, specs[name]) for name, shape in param_shapes(config).items()}
    patterns = HeadPatterns.uniform(auto_pattern(TOKENS), config.num_layers, config.num_heads).arrays()
    tokens, lengths = struct((1, TOKENS), jnp.int32, PartitionSpec()), struct((1,), jnp.int32, PartitionSpec())
    settings = {"rows_at_once": CHUNK, "implementation": None, "return_info": False, "exchange": exchange}
    inputs = (params, exchange.place(config, patterns), tokens, lengths, lengths, None, None)
    return programs.prefill.lower(config, *inputs, **settings).as_text()


def collectives(text: str) -> Counter:
    """(operation, shape and dtype of its operand) → how often it is in the program."""
    found: Counter = Counter()
    names = r"stablehlo\.(all_to_all|all_gather|all_reduce|reduce_scatter|collective_\w+)"
    for match in re.finditer(rf'"{names}"', text):
        operand = re.compile(r" : \(tensor<([^>]*)>\) ->").search(text, match.end())
        assert operand is not None
        found[match[1], operand[1]] += 1
    return found


if __name__ == "__main__":
    sizes = {name: int(size) for name, size in (part.split("=") for part in sys.argv[1:])} or {"heads": 8}
    for (operation, operand), count in sorted(
        collectives(lowered(CONFIGS["llama-3-8b"], Exchange(make_mesh(**sizes)))).items()
    ):
        print(operation, operand, count)
