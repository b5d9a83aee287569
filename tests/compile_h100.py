"""Compiles the Hopper kernel for an H100 without a GPU; fails on large spills or ptxas performance warnings.

    python tests/compile_h100.py

Needs, beside jax and jaxlib, the CUDA plugins of the same version and NVIDIA's assembler (about 1.4 GB together; keep
them in a virtual environment of their own):

    pip install jax==0.11.2 jaxtyping pytest
    pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 \
        nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-nvvm nvidia-cuda-crt
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST_SPILL = 4  # bytes: one register, which two cases put away when a thread block starts and fetch when it ends
WARNING = re.compile(r"\(C75\d\d\)[^\n]*")
SPILL = re.compile(r"(\d+) bytes spill")

# XLA's description of an H100 SXM, as a GpuTargetConfig in text form.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3" platform_version: "Compute Capability 9.0a"
  model_str: "sm_9.0a" device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.20.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 20 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compile_case(name: str) -> None:
    import jax
    from jax.experimental import topologies
    from test_hopper import SHAPES, attend

    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), SHAPES[name])
    jax.jit(attend).lower(*args).compile()


def main() -> int:
    if len(sys.argv) == 2:
        compile_case(sys.argv[1])
        return 0
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = dict(os.environ, JAX_PLATFORMS="cpu", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", PYTHONPATH=path)
    env["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    sys.path[:0] = path.split(os.pathsep)
    from test_hopper import SHAPES

    failed = False
    for name in SHAPES:
        run = subprocess.run(
            [sys.executable, __file__, name], env=env, capture_output=True, text=True, errors="replace", check=False
        )
        log = run.stdout + run.stderr
        if run.returncode or not SPILL.search(log):
            print(f"{name}: did not compile, or ptxas reported nothing\n{log[-3000:]}")
            failed = True
            continue
        spills = max(int(n) for n in SPILL.findall(log))
        warnings = WARNING.findall(log)
        print(f"{name}: {spills} bytes spilled, {len(warnings)} performance warnings", *warnings, sep="\n  ")
        failed |= spills > LARGEST_SPILL or bool(warnings)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
