"""The kernels on a mesh, whatever its axes are called: they never ask which device they are on."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from minference_jax.attention import sparse_attention
from minference_jax.patterns import AShape, SharedDensity
from pallas_kernels import axes
from pallas_kernels.device import lowering_for, on_target

NAMES = "rows", "head", "chunk", "block", "warpgroup"
"""Of a mesh: what the kernels called their own axes once."""


@pytest.mark.parametrize(
    "capability, pattern, kernels", [("9.0", SharedDensity(0.5), 5), ("8.0", AShape(64, 128), 1)], ids=str
)
@pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")
def test_an_axis_of_the_mesh_is_no_axis_of_a_kernel(capability, pattern, kernels):
    mesh = jax.make_mesh((1, 2, 1, 1, 1), NAMES, (AxisType.Auto,) * 5)
    qkv = [jax.ShapeDtypeStruct((1, 1024, n, 64), jnp.bfloat16) for n in (4, 2, 2)]

    def attend(q, k, v):
        return sparse_attention(q, k, v, pattern, axis_name="head")

    with lowering_for(capability):
        heads = P(None, None, "head")
        spread = jax.shard_map(attend, mesh=on_target(mesh), in_specs=heads, out_specs=heads, check_vma=False)
        text = jax.jit(spread).trace(*qkv).lower(lowering_platforms=("cuda",)).as_text()
    # A kernel that reads an axis of the mesh is compiled as one that talks with other devices.
    assert text.count("@mosaic_gpu_v2") == text.count("uses_xla_collective_metadata = false") == kernels


def test_names_are_of_this_package():
    names = [name for key, name in vars(axes).items() if key.isupper()]
    assert len(set(names)) == 5 and all(name.startswith("pallas_kernels.") for name in names)
