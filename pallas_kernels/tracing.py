"""How functions are traced, whatever JAX settings and mesh axes the caller has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import config
from jaxtyping import Array

from pallas_kernels.device import Device


def under_own_settings[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Traces `function` with 32-bit types and implicit broadcasting, as it is written, whatever the caller's settings.

    `jax_enable_x64` would make 64-bit numbers of Python's, which meet 32-bit arrays in loops and slices;
    `jax_numpy_rank_promotion="raise"` is a check of the caller's code. Integers of 64 bits among the arguments become
    int32, cut to its range. Results are those that the function has without these settings.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if jax.config.read("jax_enable_x64"):
            narrow: Any = (tuple(map(_narrow, args)), {name: _narrow(x) for name, x in kwargs.items()})
            args, kwargs = narrow
        with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return wrapped


def _narrow(tree: Any) -> Any:
    """The same object unless it holds integers of 64 bits."""
    wide = any(isinstance(x, jax.Array) and x.dtype in (jnp.int64, jnp.uint64) for x in jax.tree.leaves(tree))
    return jax.tree.map(_as_int32, tree) if wide else tree


def _as_int32(x: Any) -> Any:
    if isinstance(x, jax.Array) and x.dtype in (jnp.int64, jnp.uint64):
        most = jnp.iinfo(jnp.int32)
        low = jnp.asarray(0 if x.dtype == jnp.uint64 else most.min, x.dtype)
        return jnp.clip(x, low, jnp.asarray(most.max, x.dtype)).astype(jnp.int32)
    return x


def varying_axes(*trees: Any) -> frozenset[str]:
    """The mesh axes of a surrounding `jax.shard_map` along which any of the arrays differs between devices."""
    leaves = jax.tree.leaves(trees)
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))


def vary_alike[T](tree: T, *others: Any) -> T:
    """The same arrays, all marked as differing along every mesh axis along which one of them (or of `others`) does.

    Loops under `jax.shard_map` want their carries so: what starts as a constant meets what differs.
    """
    axes = varying_axes(tree, others)

    def mark(x: Any) -> Any:
        missing = axes - varying_axes(x)
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(mark, tree) if axes else tree


def without_axes[**P, R](kernel: Callable[P, R]) -> Callable[P, R]:
    """A kernel on arrays whose types name no mesh axes, as Pallas wants them; the results' types name them again.

    For `jax.shard_map` with `check_vma`: a kernel that runs on several threads is refused there otherwise.
    """

    def untyped(x: Array) -> Array:
        return lax.squeeze(lax.expand_dims(x, (0,)), (0,))  # costs nothing: types of axes are only copied while checked

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        axes = tuple(sorted(varying_axes(args, kwargs)))
        with config._check_vma(False):  # also of arrays that are the same everywhere: results have no types yet
            if axes:
                given: Any = jax.tree.map(untyped, (args, kwargs))
                args, kwargs = given
            found = kernel(*args, **kwargs)
        return jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), found) if axes else found

    return call


def on_gpus(kernel: Callable[..., Any], chain: Callable[..., Any]) -> Callable[..., Any]:
    """`chain`, or on GPUs `kernel`, which takes and gives the same. Derivatives are those of the chain."""
    if Device.default().platform != "gpu":
        return chain

    @jax.custom_jvp
    def run(*arguments: Any) -> Any:
        return jax.lax.platform_dependent(*arguments, cuda=without_axes(kernel), default=chain)

    @under_own_settings  # traced when the caller's program is differentiated, when its settings hold again
    def derivative(primals: Any, tangents: Any) -> Any:
        return jax.jvp(chain, primals, tangents)

    run.defjvp(derivative)
    return run


def sum_as(cotangent: Array, primal: Array) -> Array:
    """A cotangent summed over the mesh axes along which it differs between devices, but its array does not."""
    axes = varying_axes(cotangent) - varying_axes(primal)
    return lax.psum(cotangent, tuple(sorted(axes))) if axes else cotangent
