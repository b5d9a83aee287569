"""Which backend serves a call, and why: on devices that are not there too."""

import ast
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

import minference_jax
import pallas_kernels
from pallas_kernels import SparsePlan, choose_implementation, dense_attention
from pallas_kernels.backends import (
    DENSE_BACKENDS,
    SPARSE_BACKENDS,
    DenseImplementation,
    Implementation,
    find_backend,
)
from pallas_kernels.device import Device
from pallas_kernels.hopper import assembler

HOPPER = Device("gpu", "9.0")


def avals(t=128, s=128, n=2, h=64, dtype="bfloat16"):
    """q, k and v of a call, nothing allocated."""
    shapes = ((1, t, n, h), (1, s, 1, h), (1, s, 1, h))
    return [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]


@pytest.mark.parametrize(
    "device, dtype, name, reason",
    [
        (HOPPER, "bfloat16", "hopper", "a Hopper GPU is present"),
        (HOPPER, "float32", "xla", "the Hopper kernel computes in bfloat16 or float16; q is float32"),
        (Device("gpu", "7.5"), "bfloat16", "xla", "needs compute capability 9.0; the default device has 7.5"),
        (Device("cpu"), "bfloat16", "xla", "the default device is cpu, not a GPU"),
    ],
)
def test_the_first_backend_that_can_serves_a_plan(device, dtype, name, reason):
    choice = choose_implementation(*avals(dtype=dtype), SparsePlan(), device=device)
    assert choice.name == name and reason in choice.reason
    assert choice.backend is find_backend(name)


@pytest.mark.parametrize(
    "device, shapes, name, reason",
    [
        (HOPPER, {}, "cudnn", "a GPU is present"),
        # cuDNN's causal mask cannot start at an offset: our kernel visits every tile.
        (HOPPER, {"s": 384}, "hopper", "offset"),
        (HOPPER, {"s": 384, "dtype": "float32"}, "xla", "float32"),
        (Device("cpu"), {}, "xla", "not a GPU"),
    ],
)
def test_the_first_backend_that_can_serves_dense_attention(device, shapes, name, reason):
    choice = choose_implementation(*avals(**shapes), None, device=device)
    assert choice.name == name and reason in choice.reason


def test_a_reason_that_several_backends_share_is_said_once():
    reason = choose_implementation(*avals(), None, device=Device("cpu")).reason
    assert reason == "the default device is cpu, not a GPU"


def test_the_default_device_is_asked_where_none_is_named():
    found = choose_implementation(*avals(), SparsePlan())
    assert found == choose_implementation(*avals(), SparsePlan(), device=Device.default())


@pytest.mark.parametrize("backend", SPARSE_BACKENDS, ids=lambda backend: backend.name)
def test_a_forced_backend_is_taken_without_its_device(backend):
    choice = choose_implementation(*avals(), SparsePlan(), implementation=backend.name, device=Device("cpu"))
    assert choice == (backend.name, "asked for")


def test_names_that_cannot_serve_say_why():
    q, k, v = (jnp.zeros(x.shape, jnp.float32) for x in avals())
    with pytest.raises(ValueError, match=r'implementation must be None, "hopper".* or "reference"; got \'cudnn\''):
        choose_implementation(q, k, v, SparsePlan(), implementation="cudnn")
    with pytest.raises(ValueError, match=r'implementation="cudnn" cannot serve this call: .* bfloat16 or float16'):
        dense_attention(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match='implementation must be None, "cudnn", "hopper"'):
        find_backend("triton")


@pytest.mark.parametrize("installed", [True, False], ids=["nvJitLink", "ptxas"])
def test_an_assembler_that_moves_no_registers_is_named(monkeypatch, installed):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(assembler, "_has_nvjitlink", lambda: installed)
    choice = choose_implementation(*avals(), SparsePlan(), device=HOPPER)
    assert choice.name == "hopper" and ("setmaxnreg" in choice.reason) == installed


def test_the_types_list_the_backends():
    assert get_args(Implementation) == tuple(backend.name for backend in SPARSE_BACKENDS)
    assert get_args(DenseImplementation) == tuple(backend.name for backend in DENSE_BACKENDS)


def test_nothing_else_compares_with_a_backends_name():
    """Whoever needs to know something of a backend asks for a property of it."""
    names = {backend.name for backend in DENSE_BACKENDS}
    found = []
    for package in (pallas_kernels, minference_jax):
        for path in Path(package.__path__[0]).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Compare | ast.MatchValue):
                    texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                    found += [f"{path}:{node.lineno}: {ast.unparse(node)}"] if texts & names else []
    assert not found
