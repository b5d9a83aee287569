"""The jitted programs of a model, on one device or on all of a mesh: prefill, one decoding step, logits of every row.

Each runs its part of `forward` inside `Exchange.run`, which gives every device its slices.
"""

from __future__ import annotations

from collections.abc import Callable
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
from minference_jax.parallel.specs import is_fp8
from pallas_kernels.tracing import under_own_settings


@under_own_settings
def _all_logits(
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


@under_own_settings
def _hidden_states(
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


@under_own_settings
def _log_likelihoods(
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


# Of FP8 products XLA would compile and time Triton kernels beside cuBLASLt's, for more than a minute.
_FP8 = {"xla_gpu_enable_triton_gemm": False}
# Devices of one process copy what they exchange straight into each other's memory, which leaves the multiprocessors
# alone. (The first option is for all-to-alls and the second for permutations. They go together: NCCL's permutations
# beside such copies waited for each other for ever on two H200s, jax 0.11.2, 28c843e.) Several copies may run at once:
# measured so, not without (ca5df79).
_COPIES = {
    "xla_gpu_use_memcpy_local_p2p": True,
    "xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY",
    "xla_gpu_experimental_parallel_collective_overlap_limit": 8,
}


class Program:
    """A jitted function, compiled with the options that its parameters' kind and its devices want.

    Nested in another jitted function, it is compiled without: options are for whole programs.
    """

    def __init__(self, function: Callable[..., Any], static: tuple[str, ...], donated: tuple[str, ...] = ()) -> None:
        self._forms: dict[tuple[bool, bool], Any] = {
            (fp8, copies): jax.jit(
                function,
                static_argnames=("config", "exchange", *static),
                donate_argnames=donated,
                compiler_options=(_FP8 if fp8 else {}) | (_COPIES if copies else {}),
            )
            for fp8 in (False, True)
            for copies in (False, True)
        }

    def __call__(self, config: LlamaConfig, params: forward.Params, *inputs: Any, exchange: Exchange, **static: Any):
        """The function's results."""
        return self.form(params, exchange, *inputs)(config, params, *inputs, exchange=exchange, **static)

    def form(self, params: forward.Params, exchange: Exchange, *inputs: Any) -> Any:
        """The jitted function for such arguments."""
        here = jnp.zeros(())  # traced inside any jitted function, though that may have no arguments
        if any(isinstance(x, Tracer) for x in jax.tree.leaves((here, params, inputs))):
            return self._forms[False, False]
        return self._forms[is_fp8(params), exchange.in_one_process]

    def compiled(self) -> int:
        """How many programs of it this process has compiled."""
        return sum(form._cache_size() for form in self._forms.values())


PREFILL = Program(_run_prefill, ("rows_at_once", "implementation", "return_info"), ("cache",))
ALL_LOGITS = Program(_all_logits, ("implementation",))
HIDDEN_STATES = Program(_hidden_states, ())
LOG_LIKELIHOODS = Program(_log_likelihoods, ("implementation", "return_info"))


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
