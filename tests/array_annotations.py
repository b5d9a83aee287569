"""The type checker that jaxtyping's import hook calls in tests: beartype, on the annotations that name arrays."""

import inspect
from typing import Any, get_args

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_CHECKED = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do where a float is asked for


def _names_an_array(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(_names_an_array(part) for part in get_args(hint))


def check_arrays(function):
    """`function`, checked at each call: its array arguments and results have the dtypes and shapes of its annotations.

    Other annotations are pyright's business: tests put doubles in the place of tokenizers, and wrong values on purpose.
    Abstract shapes pass for arguments, as some functions look at nothing else; so do NumPy's arrays, which JAX takes,
    and lists, of which functions make arrays.
    Constructors are not checked: JAX rebuilds pytrees around tracers, abstract shapes and stacks of layers.
    """
    if function.__name__ == "__init__":
        return function
    hints = function.__annotations__
    function.__annotations__ = {
        name: hint | jax.ShapeDtypeStruct | np.ndarray | list for name, hint in hints.items() if _names_an_array(hint)
    }
    return _CHECKED(function) if function.__annotations__ else function
