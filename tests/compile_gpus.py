"""Compiles every kernel for every generation of GPUs without having one, and says what each takes.

    python tests/compile_gpus.py [8.0 9.0 ...]

Fails on registers spilled in a main loop, on more than a few bytes spilled anywhere, on ptxas performance warnings, and
on more shared memory than the GPU has; on any spilled register of Triton's kernels. With CASES=REGEX in the environment
it compiles those only.

Needs, beside jax and jaxlib, the CUDA plugins of the same version and NVIDIA's assembler and disassembler (about 1.4 GB
together; keep them in a virtual environment of their own):

    pip install jax==0.11.2 jaxtyping pytest
    pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 \
        nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-nvvm nvidia-cuda-crt nvidia-cuda-nvdisasm
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOST_SPILLED = 32
"""Bytes: a few registers put away when a thread block starts and fetched when it ends, or between loops."""

SHARED_MEMORY = {"8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227, "10.0": 227, "12.0": 99}
"""KiB that a thread block may use, by compute capability."""

# XLA's description of a GPU, as a GpuTargetConfig in text form. Numbers that decide nothing here are an H100's.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  device_vendor: "NVIDIA Corporation" name: "{name}" platform_version: "Compute Capability {capability}"
  model_str: "sm_{capability}" device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.20.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 20 patch: 0 }}
device_description_str: "{name}"
"""


class Case(NamedTuple):
    """A call that launches kernels: the function, the shapes of its arguments, and the GPUs that it is for.

    `compiler`: "mosaic", which prints what ptxas says when asked to, or "triton", whose kernels XLA hands to ptxas.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    capabilities: tuple[str, ...] = tuple(SHARED_MEMORY)
    compiler: str = "mosaic"


class Kernel(NamedTuple):
    """What ptxas says of one kernel, and the instructions of its main loops that move spilled registers."""

    case: str
    name: str
    registers: int
    spilled: int
    spilled_in_loops: int | None
    shared: int
    warnings: list[str]
    compiler: str = "mosaic"

    def complaints(self, capability: str) -> list[str]:
        found = list(self.warnings)
        if self.compiler == "triton":
            return [*found, "registers are spilled"] if self.spilled else found
        if self.spilled and self.spilled_in_loops != 0:
            found.append("registers are spilled in a main loop, or ptxas's listing is missing")
        if self.spilled > MOST_SPILLED:
            found.append(f"more than {MOST_SPILLED} bytes are spilled")
        if self.shared > SHARED_MEMORY[capability] * 1024:
            found.append(f"more than {SHARED_MEMORY[capability]} KiB of shared memory")
        return found


def cases() -> Iterator[Case]:
    """Every shipped configuration of every kernel."""
    import jax
    import jax.numpy as jnp
    from test_hopper import SHAPES, avals
    from test_hopper import attend as hopper
    from test_tile_masses import MASS_SHAPES, keys_on_hopper, masses_on_hopper

    from pallas_kernels.decode.append import rotate_and_append
    from pallas_kernels.decode.attention import decode_attention
    from pallas_kernels.decode.matvec import stacked_matvec
    from pallas_kernels.decode.norm import add_and_norm
    from pallas_kernels.index.fp8 import centred_keys, rounded_probes
    from pallas_kernels.index.keys import digit_counts, key_lists
    from pallas_kernels.index.normalise import normalised
    from pallas_kernels.index.probe_sums import row_totals, weight_sums
    from pallas_kernels.index.running import best_digit, tied_tiles
    from pallas_kernels.index.tile_keys import TileRule
    from pallas_kernels.index.tile_lse import GROUP
    from pallas_kernels.mma.attention import mma_attention
    from pallas_kernels.order import longest_first
    from pallas_kernels.rows.launch import RowRange
    from pallas_kernels.rows.norms import added_rows, normed_rows
    from pallas_kernels.rows.place import Place, placed_rows
    from pallas_kernels.rows.quantize import gated_rows, quantized_rows

    def warps(q, k, v, plan, lengths, q_offset):
        return mma_attention(q, k, v, plan, lengths=lengths, q_offset=q_offset, return_lse=True)

    size = 1 << 14
    for h in (64, 96, 128, 256):
        every = avals(1, size, size, 32, 8, h, columns=1024, bands=64, blocks=16)
        yield Case(f"attention D{h}", warps, every)
    yield Case("attention D128 fp16, bands", warps, avals(1, size, size, 32, 8, 128, bands=64, dtype="float16"))
    yield Case("attention D128, diagonal", warps, avals(1, size, size, 32, 8, 128))
    for name, shapes in SHAPES.items():
        yield Case(f"attention {name}", hopper, shapes, ("9.0",))
    for name, shapes in MASS_SHAPES.items():
        yield Case(f"masses {name}", masses_on_hopper, shapes, ("9.0",))
        yield Case(f"keys {name}", keys_on_hopper, shapes, ("9.0",))
    shape = jax.ShapeDtypeStruct
    keys, rows = shape((1, 32, 1024, 2048), jnp.uint16), shape((1, 1024), jnp.int32)
    first = lambda keys, rows: digit_counts(keys, rows, None, None, shift=7, bits=8)  # noqa: E731
    second = lambda *arrays: digit_counts(*arrays, shift=0, bits=7)  # noqa: E731
    prefix = shape((1,), jnp.int32)
    yield Case("selection, first digit", first, (keys, rows), ("9.0",))
    of_columns = shape((1, 32, 2048), jnp.int32)
    yield Case("selection, second digit, columns", second, (keys, rows, of_columns, prefix), ("9.0",))
    yield Case("selection, lists", key_lists, (keys, prefix, shape((1, 32, 1024), jnp.int32)), ("9.0",))
    counts, cells, level = shape((1, 528, 256), jnp.int32), shape((1,), jnp.float32), partial(best_digit, highest=9)
    yield Case("selection, best digit", level, (counts, cells, cells, prefix), ("9.0",), "triton")
    found, ties = shape((1, 32, 1024), jnp.int32), partial(tied_tiles, unit=64, width=2048)
    yield Case("selection, ties", ties, (found, found, rows, cells), ("9.0",), "triton")
    for t, probes in ((32_768, 8), (131_072, 2), (4_096, 128)):
        i, j = t // 128, t // 64
        rule = TileRule(shape((i,), jnp.int32), rows := shape((1, i), jnp.int32), rows, shape((1, 32), jnp.float32))
        logarithms = shape((1, 8, 4 * probes * i, j), jnp.float32), shape((1, 8, 2, 4 * probes * i), jnp.float32)
        of_probes = shape((1, 4 * probes * i), jnp.int32), shape((1, i, probes), jnp.float32)
        for name, by in (("masses", None), ("keys", rule)):
            call = partial(normalised, heads=32, keys=t, chunk=t // 2)
            yield Case(f"{name} of {probes}", call, (*logarithms, *of_probes, by), ("9.0",), "triton")
    for h, kv_heads, groups in ((128, 8, 256), (96, 8, 32), (64, 2, 2048)):
        of_keys = shape((1, groups * GROUP, kv_heads, h), jnp.bfloat16), shape((1,), jnp.int32)
        yield Case(f"{groups} groups of keys D{h}", centred_keys, of_keys, ("9.0",), "triton")
        of_tiles = shape((1, 4 * groups, 8), jnp.int32)
        of_probes = shape((1, groups * GROUP, 32, h), jnp.bfloat16), shape((1, groups, kv_heads, h), jnp.bfloat16)
        yield Case(f"probes D{h}", rounded_probes, (*of_probes, of_tiles, of_tiles), ("9.0",), "triton")
    every = tuple(SHARED_MEMORY)
    yield Case("the longest first", longest_first, (shape((32, 1024), jnp.int32),), every, "triton")
    for dtype, size in ((jnp.bfloat16, 1 << 20), (jnp.bfloat16, 5000), (jnp.float32, 1 << 20)):
        name, rows = f"{size}, {jnp.dtype(dtype).name}", shape((4, 64), jnp.int32)
        arguments = (shape((256, size), dtype), shape((256,), jnp.int32))
        yield Case(f"probes, totals: {name}", partial(row_totals, factor=0.7), arguments, every, "triton")
        arguments = (shape((4, 64, size), dtype), rows, shape((4, 64), jnp.float32))
        for by, skip in (("key", None), ("distance", 64)):
            sums = partial(weight_sums, factor=0.7, skip=skip)
            yield Case(f"probes, by {by}: {name}", sums, arguments, every, "triton")

    one, with_fp8 = shape((), jnp.int32), ("8.9", "9.0", "10.0", "12.0")
    for dtype, capabilities in ((jnp.bfloat16, tuple(SHARED_MEMORY)), (jnp.float8_e4m3fn, with_fp8)):
        name, narrow = jnp.dtype(dtype).name, dtype != jnp.bfloat16
        cache, query = shape((2, 1, 8192, 8, 128), dtype), shape((1, 32, 128), jnp.bfloat16)
        scale = shape((2, 1, 8192, 8), jnp.bfloat16) if narrow else None

        def decode(q, k, v, layer, lengths, scale):
            return decode_attention(q, k, v, layer, lengths, k_scale=scale, v_scale=scale)

        arguments = (query, cache, cache, one, prefix, scale)
        yield Case(f"decode, cache in {name}", decode, arguments, capabilities, "triton")
        alone, few = shape((2, 1, 131072, 1, 128), dtype), shape((1, 8, 128), jnp.bfloat16)  # on one of many GPUs
        arguments = (few, alone, alone, one, prefix, shape((2, 1, 131072, 1), jnp.bfloat16) if narrow else None)
        yield Case(f"decode, a KV head in {name}", decode, arguments, capabilities, "triton")

        def multiply(x, weight, layer, scales):
            return stacked_matvec(x, [weight], layer, scales)

        def gated(x, weight, layer, scales):
            return stacked_matvec(x, [weight] * 2, layer, scales * 2, activation="silu")

        weight, scales = shape((2, 4096, 4096), dtype), (shape((2, 4096), jnp.float32),) if narrow else ()
        for rows in (1, 16):
            arguments = (shape((rows, 4096), jnp.bfloat16), weight, one, scales)
            yield Case(f"matvec of {rows} in {name}", multiply, arguments, capabilities, "triton")
        arguments = (shape((1, 4096), jnp.bfloat16), weight, one, scales)
        yield Case(f"matvec, silu in {name}", gated, arguments, capabilities, "triton")

    for width in (300, 2880, 4096, 5120, 16384):
        x, added = shape((2, width), jnp.bfloat16), shape((2, width), jnp.float32)
        arguments = (x, added, shape((2, width), jnp.bfloat16), one)
        yield Case(
            f"added, norm of {width}", partial(add_and_norm, eps=1e-5), arguments, tuple(SHARED_MEMORY), "triton"
        )
    row, cache = shape((1, 8, 128), jnp.bfloat16), shape((2, 1, 8192, 8, 128), jnp.bfloat16)
    arguments = (query, row, row, *(shape((2, 1, 64), jnp.float32),) * 2, None, cache, cache, one, prefix)
    yield Case("rotated and appended", rotate_and_append, arguments, tuple(SHARED_MEMORY), "triton")

    def added_part(*arrays):
        return added_rows(*arrays[:-1], eps=1e-5, part=RowRange(arrays[-1], 4096))

    for width in (300, 14336, 32768):
        x, row, channel = shape((4096, width), jnp.bfloat16), shape((4096,), jnp.float32), shape((width,), jnp.float32)
        weight = shape((width,), jnp.bfloat16)
        for offset in (None, 1.0):
            norm = partial(normed_rows, eps=1e-5, offset=offset)
            yield Case(f"norm of {width}, offset {offset}", norm, (x, weight), with_fp8, "triton")
        for activation in ("silu", "gelu"):
            gate = partial(gated_rows, activation=activation)
            yield Case(f"{activation} of {width}", gate, (x, x, row, channel, channel), with_fp8, "triton")
        yield Case(f"rows of {width}", quantized_rows, (x,), with_fp8, "triton")
    for width in (300, 896, 3584, 4096, 5120, 8192, 16384):
        x, y = shape((1, 8192, width), jnp.bfloat16), shape((4096, width), jnp.bfloat16)
        arguments = (x, y, row, shape((width,), jnp.float32), shape((width,), jnp.bfloat16), one)
        yield Case(f"added rows of {width}", added_part, arguments, with_fp8, "triton")
    place = Place(one, one, one, one)
    for n, h, whole, into_heads, heads in (
        *(
            (32, 128, 1 << 20, 32, None),
            (8, 128, 1 << 20, 8, None),
            (28, 64, 1 << 15, 28, None),
            (3, 16, 4096, 3, None),
        ),
        *((32, 128, 1 << 20, 16, 16), (8, 128, 1 << 17, 24, 4), (8, 128, 1 << 17, 6, 1)),  # on one of many GPUs
    ):
        into, channel = shape((1, whole, into_heads, h), jnp.bfloat16), shape((n, h), jnp.float32)
        y, scale = shape((1, 4096, n * h), jnp.bfloat16), shape((1, 4096), jnp.float32)
        for turn in (None, (shape((1, 4096, h // 2), jnp.float32),) * 2):
            name = f"placed rows of {heads or n} x {h}{'' if turn is None else ', rotated'}"
            arguments = (into, place, y, scale, channel, turn)
            yield Case(name, partial(placed_rows, heads=heads), arguments, tuple(SHARED_MEMORY), "triton")


def topology_of(capability: str, devices: int = 1) -> Any:
    """So many GPUs of this kind on one host, none of which is here."""
    from jax.experimental import topologies

    from pallas_kernels.device import GPUS

    name, cores = GPUS[capability]
    major, minor = capability.split(".")
    target = TARGET.format(
        name=name,
        cores=cores,
        shared=SHARED_MEMORY[capability] * 1024,
        major=major,
        minor=minor,
        feature="feature_extension: ACCELERATED_FEATURES" if int(major) >= 9 else "",
        capability=capability,
    )
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{devices}")


def sharding_on(capability: str) -> Any:
    """Where a program for a GPU of this kind places its arguments."""
    import jax
    from jax.experimental import topologies

    mesh = topologies.make_mesh(topo=topology_of(capability), mesh_shape=(1,), axis_names=("device",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compile_all(capability: str, compiler: str, wanted: str) -> None:
    """Compiles the cases of one GPU and compiler, and prints a line of JSON for each kernel."""
    import jax
    from jax.experimental.mosaic.gpu import core

    from pallas_kernels.device import lowering_for

    shared: list[int] = []
    measure = core._smem_tree_size  # pyright: ignore[reportPrivateUsage]

    def measured(buffers: Any) -> int:
        shared.append(measure(buffers))
        return shared[-1]

    core._smem_tree_size = measured
    sharding, answers = sharding_on(capability), os.fdopen(os.dup(1), "w")
    for case in cases():
        if capability not in case.capabilities or case.compiler != compiler or not re.search(wanted, case.name):
            continue
        shared.clear()
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.arguments)
        with tempfile.TemporaryFile() as log, lowering_for(capability):
            for stream in (1, 2):  # ptxas writes to the process's own
                os.dup2(log.fileno(), stream)
            jax.jit(case.call).lower(*arguments).compile()
            log.seek(0)
            text = log.read().decode(errors="replace")
        found = kernels_of(case.name, text, shared) if compiler == "mosaic" else triton_kernels_of(case.name, text)
        for kernel in found:
            print(json.dumps(kernel), file=answers, flush=True)


def triton_kernels_of(case: str, log: str) -> Iterator[Kernel]:
    """What XLA's log of one compilation says of each kernel that is not one of XLA's own."""
    for report in re.split(r"(?=Compiling entry function)", log)[1:]:
        (name,) = re.findall(r"entry function '(\w+)'", report)
        if "fusion" in name or "wrapped" in name:
            continue
        spilled = max(map(int, re.findall(r"(\d+) bytes spill", report)))
        (registers,) = map(int, re.findall(r"Used (\d+) registers", report))
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", report)))
        yield Kernel(case, name, registers, spilled, None, shared, [], "triton")


def kernels_of(case: str, log: str, shared: list[int]) -> Iterator[Kernel]:
    """What the log of one compilation says of each kernel."""
    listings = re.split(r"(?=\t\.target)", log)[1:]
    reports = re.split(r"(?=Compiling entry function)", log)[1:]
    if not reports:
        raise SystemExit(f"{case}: ptxas reported nothing\n{log[-2000:]}")
    for place, report in enumerate(reports):
        (name,) = re.findall(r"entry function '(\w+?)(?:_mosaic\w*)?'", report)
        spilled = max(map(int, re.findall(r"(\d+) bytes spill", report)))
        (registers,) = map(int, re.findall(r"Used (\d+) registers", report))
        warnings = re.findall(r"\(C75\d\d\)[^\n]*", report)
        in_loops = None
        if len(listings) == len(reports):
            frame, stored = (int(n) for n in re.findall(r"(\d+) bytes stack frame, (\d+)", report)[0])
            in_loops = spills_in_loops(listings[place], frame - stored)
        yield Kernel(case, name, registers, spilled, in_loops, shared[place], warnings)


def spills_in_loops(sass: str, variables: int) -> int:
    """Instructions that move spilled registers (local memory) in innermost loops with matrix products.

    The first `variables` bytes of local memory hold what was never in registers, the phases of barriers.
    """
    lines = sass.splitlines()
    labels = {match[1]: at for at, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for at, line in enumerate(lines):
        if (match := re.search(r"\bBRA\S*\s.*?(\.L_x_\d+)", line)) and labels.get(match[1], at) < at:
            loops.append((labels[match[1]], at))
    with_products = [(a, b) for a, b in loops if any(re.search(r"\b[HQ]?G?MMA\.|\bHMMA", x) for x in lines[a:b])]
    inner = [x for x in with_products if not any(x[0] <= y[0] and y[1] <= x[1] and x != y for y in with_products)]
    moves = [re.search(r"\b(?:LDL|STL)\b.*\[R1(?:\+(0x[0-9a-f]+))?\]", line) for a, b in inner for line in lines[a:b]]
    return sum(int(move[1] or "0", 16) >= variables for move in moves if move)


def compiled(capability: str, compiler: str, wanted: str, env: dict[str, str]) -> bool:
    """Compiles in a process of its own, prints a line for each kernel, and says whether anything failed."""
    command, failed = [sys.executable, __file__, "--child", capability, compiler, wanted], False
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if not line.startswith("["):
                print(line, end="")
                continue
            kernel = Kernel(*json.loads(line))
            complaints = kernel.complaints(capability)
            in_loops = "?" if kernel.spilled_in_loops is None else kernel.spilled_in_loops
            numbers = f"{kernel.registers:10}{kernel.spilled:8}{in_loops:>9}{kernel.shared:8}"
            print(f"{capability:5}{kernel.case:42}{kernel.name:24}{numbers}", *complaints, sep="  ", flush=True)
            failed |= bool(complaints)
    if child.returncode:  # a compiler that aborts leaves no message
        print(f"{capability:5}{compiler}: ended with status {child.returncode} at the case after the last one above")
    return failed or child.returncode != 0


def main() -> int:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    if sys.argv[1:2] == ["--child"]:
        compile_all(*sys.argv[2:])
        return 0
    env = dict(os.environ, JAX_PLATFORMS="cpu", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", PYTHONPATH=path)
    logs = {
        "mosaic": {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_SASS": "1"},
        "triton": {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "subprocess_compilation=3"},
    }
    failed = False
    wanted = os.environ.get("CASES", "")
    print(f"{'GPU':5}{'case':42}{'kernel':24}{'registers':>10}{'spilled':>8}{'in loops':>9}{'shared':>8}")
    for capability in sys.argv[1:] or SHARED_MEMORY:
        for compiler, log in logs.items():
            failed |= compiled(capability, compiler, wanted, env | log)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
