"""Test-wide settings: strict dtype promotion, two CPU devices, full-precision matrix products. Warnings are errors.

Most of the suite's time goes into compilation. Programs are compiled without most optimizations and by XLA's older
emitters of CPU code, here and in child processes; tests that compute for long ask for the fixture `optimized`. What was
compiled is kept in .pytest_cache/jax, which the workers of pytest-xdist, the child processes and the next run share.
Python's own bytecode is kept too, also where PYTHONDONTWRITEBYTECODE is set: a child process that parses the sources of
JAX and transformers anew takes five to ten seconds longer to start.

Annotated shapes and dtypes are checked at every call (jaxtyping and beartype), in this process, unless CHECK_ARRAYS=0
or beartype is not installed.
"""

import gc
import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The newer emitters set MLIR up anew for every fusion of a program: compilation then takes two to three times longer.
# In one piece, and without wide vectors, it takes a fifth less.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_prefer_vector_width=128" + (" --xla_cpu_max_isa=AVX2" if platform.machine() == "x86_64" else ""),
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads spin while they wait for each other
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA warns at length about programs that come from the cache
os.environ["PYTHONDONTWRITEBYTECODE"] = ""

import jax
import jaxtyping
import pytest
import sweeps

sys.dont_write_bytecode = False
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "float32")

if os.environ.get("CHECK_ARRAYS") != "0" and find_spec("beartype") is not None:
    jaxtyping.install_import_hook(["minference_jax", "pallas_kernels"], "array_annotations.check_arrays")

# Traces are millions of small objects that stay: collecting garbage as rarely as this saves a twentieth of the time.
gc.set_threshold(100_000, 20, 20)

LONGEST = (
    "test_cache.py",
    "test_parity_variants.py",
    "test_search.py",
    "test_settings.py",
    "test_unspent.py",
    "test_llama.py",
    "test_index_vertical_slash.py",
    "test_index_shared_density.py",
    "test_generate.py",
    "test_backends.py",
    "test_readme.py",
    "test_sparse_attention.py",
    "test_search_cli.py",
    "test_prefill.py",
    "test_batch.py",
    "test_plan.py",
    "test_mesh.py",
    "test_dual_chunk.py",
    "test_eval_runner.py",
    "test_attention.py",
    "test_cli.py",
    "test_hopper.py",
    "test_gradients.py",
    "test_bench_recall.py",
    "test_terminal.py",
    "test_gpus.py",
    "test_tile_masses.py",
    "test_rows.py",
    "test_hopper_tables.py",
    "test_viz.py",
    "test_stream.py",
    "test_select.py",
    "test_append.py",
    "test_spread.py",
)
"""Files whose tests take more than eight seconds on one core, the longest first (`--durations=0` tells)."""


@pytest.hookimpl(tryfirst=True)  # before the marks select
def pytest_collection_modifyitems(config, items):
    """Marks the sweeps. The longest files come first, so that no worker is left alone with one of them at the end."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
    names = [
        (item.path.name, item.originalname, item.callspec.id if hasattr(item, "callspec") else "") for item in items
    ]
    for item, name in zip(items, names, strict=True):
        if sweeps.is_sweep(*name) and item.get_closest_marker("nightly") is None:
            item.add_marker("sweep")
    whole_files = not any("::" in argument for argument in config.args) and not config.getoption("lf", default=False)
    if whole_files and (missing := sweeps.missing(names)):
        raise pytest.UsageError(f"tests/sweeps.py names tests or cases that are not there: {', '.join(missing)}")


MOST_MAPPINGS = 30_000
"""Of the memory of one process. Each compiled program takes some, Linux allows 65,530, and a process that needs more
crashes. Programs that are dropped come back from the compile cache."""


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """After a file, a process that has compiled thousands of programs forgets them.

    Another is told that what there is by now stays: to look through all of it for garbage takes ten seconds in the end.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
    gc.freeze()


@pytest.fixture
def rng():
    """A NumPy generator with a fixed seed, new for each test."""
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture
def unchecked():
    """Annotated shapes are not checked: for tests that give wrong arrays, to see what users are told."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def optimized(monkeypatch):
    """Programs compiled as users have them, for the test that asks for this and its child processes."""
    before = jax.config.read("jax_disable_most_optimizations")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
