"""What layers of Flax pass to an attention function beside queries, keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import jax.numpy as jnp
from jaxtyping import Array, Float


class LayerKeywords(TypedDict, total=False):
    """The keywords of an `attention_fn`: accepted where they change nothing, or only the dtype of the arrays.

    `is_causal=True` is what sparse attention does. A layer says `is_causal=False` where its caller says nothing, so
    from a layer it is no request; a call without a layer's other keywords means it, and is refused.
    """

    bias: Any
    mask: Any
    dropout_rng: Any
    dropout_rate: float
    broadcast_dropout: bool
    deterministic: bool | None
    dtype: Any
    precision: Any
    module: Any
    promote_dtype: Callable[..., Any] | None
    is_causal: bool | None
    force_fp32_for_softmax: bool
    qk_attn_weights_einsum: Any
    attn_weights_value_einsum: Any


NOT_HERE = {
    "bias": "the mask is the pattern's, and nothing is added to the scores",
    "mask": "it is causal, with the mask of its pattern; say is_causal=True, and use lengths for padding",
    "module": "the attention weights never exist, so a layer can't keep them (sow_weights)",
    "precision": "kernels choose the precision of their products by the dtype",
    "qk_attn_weights_einsum": "kernels do this product",
    "attn_weights_value_einsum": "kernels do this product",
}
"""Keywords that must be None, and why."""


def check_layer_keywords(keywords: Mapping[str, Any]) -> None:
    """Raises TypeError for a keyword that no layer passes, ValueError for one that would have to be left out."""
    for name, value in keywords.items():
        if name not in LayerKeywords.__annotations__:
            raise TypeError(f"sparse_attention() got an unexpected keyword argument {name!r}")
        if name in NOT_HERE and value is not None:
            raise ValueError(f"sparse attention takes no {name}: {NOT_HERE[name]}")
    if keywords.get("is_causal") is False and "deterministic" not in keywords:
        raise ValueError("sparse attention is causal, got is_causal=False")
    rate = keywords.get("dropout_rate", 0.0)
    if rate and not keywords.get("deterministic", False):
        raise ValueError(f"sparse attention has no dropout, got dropout_rate {rate}; pass deterministic=True")


def check_own_keys(q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], keywords: Mapping[str, Any]) -> None:
    """Raises ValueError for a layer's call with other keys than its queries': cross-attention is not causal."""
    if "deterministic" in keywords and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"sparse attention in a layer is causal self-attention: queries and keys must have the same positions, got "
            f"q {q.shape}, k {k.shape}"
        )


def naming_layer_keywords[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Writes the keywords into the signature of a function that takes them as `**layer`.

    Flax's older layers (linen) leave out what the signature does not name: a mask would be dropped silently.
    """
    signature = inspect.signature(function)
    named = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    named += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in LayerKeywords.__annotations__
    ]
    function.__signature__ = signature.replace(parameters=named)  # pyright: ignore[reportFunctionMemberAccess]
    return function


def in_dtype(
    q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], v: Float[Array, "b s k h"], keywords: Mapping[str, Any]
) -> tuple[Array, Array, Array]:
    """The arrays in the dtype that a layer computes in, if it says so."""
    dtype, promote = keywords.get("dtype"), keywords.get("promote_dtype")
    if promote is not None:
        return promote((q, k, v), dtype=dtype)
    return (q, k, v) if dtype is None else (jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype))
