"""The jitted programs of a model, on one device or on all of a mesh: prefill, one decoding step, logits of every row.

Each runs its part of `forward` inside `Exchange.run`, which gives every device its slices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int32

from minference_jax.models import forward
from minference_jax.models.cache import KVCache
from minference_jax.models.config import LlamaConfig
from minference_jax.parallel.exchange import OF_HEADS, ONE, Exchange
from pallas_kernels.tracing import under_own_settings


@partial(jax.jit, static_argnames=("config", "exchange", "implementation"))
@under_own_settings
def all_logits(
    config: LlamaConfig,
    params: forward.Params,
    patterns: Any,
    tokens: Array,
    lengths: Array,
    exchange: Exchange,
    implementation: str | None,
) -> Array:
    def own(params: forward.Params, patterns: Any, tokens: Array, lengths: Array) -> Array:
        inputs = (config, params, patterns, tokens, lengths, lengths, None, None)
        x, _, _ = forward.prefill(*inputs, exchange=exchange, implementation=implementation)
        return forward.logits(config, exchange.whole(config, params, "embed", "lm_head"), x)

    rows = exchange.run(config, own, params, patterns, tokens, lengths, out=exchange.rows_on(1))
    return exchange.in_order(rows, 1, tokens.shape[1])


@partial(jax.jit, static_argnames=("config", "exchange"))
@under_own_settings
def hidden_states(
    config: LlamaConfig, params: forward.Params, patterns: Any, tokens: Array, lengths: Array, exchange: Exchange
) -> Array:
    def own(params: forward.Params, patterns: Any, tokens: Array, lengths: Array) -> Array:
        inputs = (config, params, patterns, tokens, lengths, lengths, None, None)
        x, _, levels = forward.prefill(*inputs, keep="hidden", exchange=exchange)
        last = forward.norm(config, x, params["final_norm"])
        first = forward.embed(config, exchange.whole(config, params, "embed"), exchange.own_rows(tokens))
        return jnp.concatenate([first[None], levels, last[None]])

    rows = exchange.run(config, own, params, patterns, tokens, lengths, out=exchange.rows_on(2))
    return exchange.in_order(rows, 2, tokens.shape[1])


@partial(jax.jit, static_argnames=("config", "exchange", "implementation", "return_info"))
@under_own_settings
def log_likelihoods(
    config: LlamaConfig,
    params: forward.Params,
    patterns: Any,
    tokens: Array,
    lengths: Array,
    exchange: Exchange,
    implementation: str | None,
    return_info: bool,
) -> tuple[Array, Any]:
    keep = "info" if return_info else "nothing"

    def own(params: forward.Params, patterns: Any, tokens: Array, lengths: Array) -> tuple[Array, Any]:
        inputs = (config, params, patterns, tokens, lengths, lengths, None, None)
        x, _, info = forward.prefill(*inputs, keep=keep, exchange=exchange, implementation=implementation)
        return forward.log_likelihoods(config, params, x, tokens, lengths, exchange), info

    out = (exchange.everywhere, OF_HEADS)
    return exchange.run(config, own, params, patterns, tokens, lengths, out=out)


@under_own_settings
def _run_prefill(
    config: LlamaConfig,
    params: forward.Params,
    patterns: Any,
    tokens: Array,
    lengths: Array,
    rope_lengths: Array,
    cache: KVCache | None,
    start: Array | None,
    order: Array | None = None,
    *,
    rows_at_once: int,
    implementation: str | None,
    return_info: bool,
    exchange: Exchange = ONE,
) -> tuple[Array, KVCache | None, Any]:
    def in_order(x: Any, order: Array, axis: int) -> Any:
        place = forward.of_heads(order, config.num_heads)
        return jax.tree.map(
            lambda x: jnp.take_along_axis(x, jnp.expand_dims(place, 1) if axis == 2 else place, axis), x
        )

    own = partial(
        *(_prefill_own, config, exchange),
        keep="info" if return_info else "nothing",
        chunk=rows_at_once,
        implementation=implementation,
    )
    out = (exchange.everywhere, exchange.specs(config, cache), OF_HEADS)
    patterns = patterns if order is None else in_order(patterns, order, 1)
    inputs = (params, patterns, tokens, lengths, rope_lengths, cache, start, order)
    logits, cache, info = exchange.run(config, own, *inputs, out=out)
    return logits, cache, info if order is None else in_order(info, jnp.argsort(order, axis=1), 2)


def _prefill_own(
    config: LlamaConfig,
    exchange: Exchange,
    params: forward.Params,
    patterns: Any,
    tokens: Array,
    lengths: Array,
    rope_lengths: Array,
    cache: KVCache | None,
    start: Array | None,
    order: Array | None,
    **options: Any,
) -> tuple[Array, KVCache | None, Any]:
    """What each device does of a prefill."""
    inputs = (config, params, patterns, tokens, lengths, rope_lengths, cache, start)
    x, cache, info = forward.prefill(*inputs, exchange=exchange, order=order, **options)
    t = tokens.shape[1]
    head = partial(forward.last_logits, config, params, t=t, exchange=exchange)
    if start is None:
        return head(x, lengths - 1), cache, info
    last = lengths - 1 - start
    shape = jax.eval_shape(head, x, last)
    # Most parts of a prompt hold no last token, and the head of an 8B model is as large as two of its layers.
    ends = jnp.any((last >= 0) & (last < t))
    return jax.lax.cond(ends, head, lambda *_: jnp.zeros(shape.shape, shape.dtype), x, last), cache, info


_compiled = partial(
    jax.jit,
    static_argnames=("config", "rows_at_once", "implementation", "return_info", "exchange"),
    donate_argnames=("cache",),
)
# Of FP8 products XLA would compile and time Triton kernels beside cuBLASLt's, for more than a minute.
_FP8 = {"xla_gpu_enable_triton_gemm": False}
# Devices of one host copy what they exchange straight into each other's memory, which leaves the multiprocessors alone;
# NCCL's kernels beside such copies wait for each other for ever. Several copies run beside what is computed: XLA would
# otherwise wait for all but one of them.
_COPIES = {
    "xla_gpu_use_memcpy_local_p2p": True,
    "xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY",
    "xla_gpu_experimental_parallel_collective_overlap_limit": 8,
}
_prefill_of: dict[tuple[bool, bool], Any] = {
    (fp8, mesh): _compiled(_run_prefill, compiler_options=(_FP8 if fp8 else {}) | (_COPIES if mesh else {}))
    for fp8 in (False, True)
    for mesh in (False, True)
}


def prefill_program(fp8_projections: bool, exchange: Exchange, *inputs: Any) -> Any:
    """The jitted function that prefills; nested in another, the plain one: options are for whole programs."""
    nested = any(isinstance(x, Tracer) for x in inputs)
    return _prefill_of[(False, False) if nested else (fp8_projections, exchange.size > 1)]


def programs_compiled() -> int:
    """How many prefill programs this process has compiled."""
    return sum(function._cache_size() for function in _prefill_of.values())


def decode_step(
    config: LlamaConfig,
    params: forward.Params,
    tokens: Int32[Array, " b"],
    cache: KVCache,
    active: Array | None,
    exchange: Exchange,
) -> tuple[Float[Array, "b vocab"], KVCache]:
    """`forward.decode` on the devices that share the work."""

    def own(params: forward.Params, tokens: Array, cache: KVCache, active: Array | None) -> tuple[Array, KVCache]:
        return forward.decode(config, params, tokens, cache, active, exchange)

    out = (exchange.everywhere, exchange.specs(config, cache))
    return exchange.run(config, own, params, tokens, cache, active, out=out)


@partial(jax.jit, static_argnames=("config", "exchange"), donate_argnames=("cache",))
@under_own_settings
def decode(
    config: LlamaConfig, params: forward.Params, tokens: Array, cache: KVCache, exchange: Exchange
) -> tuple[Array, KVCache]:
    return decode_step(config, params, tokens, cache, None, exchange)
