"""What made a result, as hashes of content: another model, text or setting has another one, whatever its name is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping, Set
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array


def package_version() -> str:
    """Of this package; "unknown" in a checkout that is not installed."""
    try:
        return version("minference-jax")
    except PackageNotFoundError:
        return "unknown"


def model_identity(model: Any, tokenizer: Any) -> dict[str, str]:
    """What of a `Llama` and its tokenizer makes results, but for patterns, as names and hashes; and the package."""
    return {
        "model": content_digest(model.config),
        "weights": weights_digest(model.params()),
        "dtype": model.dtype.name,
        "tokenizer": content_digest(tokenizer),
        "version": package_version(),
    }


def weights_digest(params: Mapping[str, Array]) -> str:
    """A hash of every element of every parameter, names, shapes and dtypes: one changed number changes it.

    Each parameter is read once where it lies, and reduced to two checksums of 32 bits; these are hashed.
    """
    digest = hashlib.sha256()
    for name in sorted(params):
        value = params[name]
        sums = np.asarray(_checksums(value), "<u4")
        digest.update(f"{name} {value.shape} {value.dtype} ".encode() + sums.tobytes())
    return digest.hexdigest()


@jax.jit
def _checksums(x: Array) -> Array:
    """Two sums modulo 2**32 of each element's bits, mixed with its place. Sums of integers have no order, so an array
    that is spread over devices has the same ones."""
    width = x.dtype.itemsize * 8
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    elif width <= 32:
        bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    else:  # the last axis holds the halves
        bits = lax.bitcast_convert_type(x, jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    sums = []
    for first, second in ((0x9E3779B1, 0x85EBCA6B), (0xC2B2AE35, 0x27D4EB2F)):
        mixed = (bits ^ (place * jnp.uint32(first))) * jnp.uint32(second)
        mixed = (mixed ^ (mixed >> jnp.uint32(15))) * jnp.uint32(first)
        sums.append((mixed ^ (mixed >> jnp.uint32(13))).sum(dtype=jnp.uint32))
    return jnp.stack(sums)


def content_digest(value: Any) -> str:
    """A hash of what an object holds: numbers, texts, arrays, and the fields of objects, as deep as they go.

    An object with a method `digest()` is what that returns. A function is its code and what it closes over. The same
    content gives the same hash in another process, with the same Python and the same package.
    """
    digest = hashlib.sha256()
    _add(digest, value, ())
    return digest.hexdigest()


def _add(digest: Any, value: Any, above: tuple[int, ...]) -> None:
    def tell(*parts: Any) -> None:
        digest.update(" ".join(map(str, parts)).encode("utf-8", "surrogatepass") + b"\0")

    def go_on(*values: Any) -> None:
        for one in values:
            _add(digest, one, (*above, id(value)))

    if id(value) in above:  # an object that holds itself
        tell("above", above.index(id(value)))
    elif value is None or isinstance(value, bool | int | float | complex):
        tell(type(value).__name__, repr(value))
    elif isinstance(value, str):
        tell("str", len(value), value)
    elif isinstance(value, bytes):
        tell("bytes", len(value))
        digest.update(value)
    elif isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        tell("array", array.shape, array.dtype)
        digest.update(np.ascontiguousarray(array).tobytes())
    elif isinstance(value, Mapping):
        tell("mapping", len(value))
        go_on(*(part for item in value.items() for part in item))
    elif isinstance(value, list | tuple):
        tell("sequence", len(value))
        go_on(*value)
    elif isinstance(value, Set):
        tell("set", *sorted(map(content_digest, value)))
    elif isinstance(value, type | types.ModuleType | types.BuiltinFunctionType | np.dtype):
        tell("name", getattr(value, "__module__", ""), getattr(value, "__qualname__", str(value)))
    elif callable(own := getattr(value, "digest", None)):
        tell("digest", own())
    elif isinstance(value, types.CodeType):
        tell("code", value.co_names, value.co_varnames)
        go_on(value.co_code, *value.co_consts)
    elif isinstance(value, types.FunctionType):
        tell("function", value.__module__, value.__qualname__)
        go_on(value.__code__, value.__defaults__, value.__kwdefaults__)
        go_on(*(cell.cell_contents for cell in value.__closure__ or ()))
    elif isinstance(value, types.MethodType):
        go_on(value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        go_on(value.func, value.args, value.keywords)
    elif hasattr(value, "__wrapped__"):  # as functools.cache and jax.jit wrap
        go_on(value.__wrapped__)
    elif dataclasses.is_dataclass(value):
        tell("object", type(value).__module__, type(value).__qualname__)
        go_on({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    else:
        tell("object", type(value).__module__, type(value).__qualname__)
        go_on({name: one for name, one in sorted(getattr(value, "__dict__", {}).items()) if not name.startswith("__")})
