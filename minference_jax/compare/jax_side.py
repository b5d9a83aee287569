"""The JAX side of a comparison: one prefill whose intermediate results are kept, then a greedy continuation.

It calls the same functions as `Llama`'s own entry points, compiled here so that compilation can be timed by itself.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from minference_jax.compare.torch_side import open_arrays
from minference_jax.models import forward
from minference_jax.models.config import LlamaConfig
from minference_jax.models.llama import Llama

__all__ = ["run_jax"]


@partial(jax.jit, static_argnames=("config", "keep"), donate_argnames=("cache",))
def _prefill(config: LlamaConfig, params: Any, patterns: Any, tokens: Array, lengths: Array, cache: Any, keep: str):
    return forward.prefill(config, params, patterns, tokens, lengths, lengths, cache, None, keep=keep)


_decode = jax.jit(forward.decode, static_argnames=("config",), donate_argnames=("cache",))


@partial(jax.jit, static_argnames=("config",))
def _score(
    config: LlamaConfig, params: Any, x: Array, start: Int32[Array, ""], following: Int32[Array, "b c"]
) -> dict[str, Array]:
    """Logits of the rows from `start` on, as many as `following` has, and what is kept of every row's logits."""
    rows = jax.lax.dynamic_slice_in_dim(x, start, following.shape[1], axis=1)
    logits: Float32[Array, "b c vocab"] = forward.logits(config, params, rows)
    # Not top_k, which takes 30 times as long on a CPU.
    first, best = jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.max(logits, axis=-1)
    others = jnp.where(jnp.arange(logits.shape[-1], dtype=jnp.int32) == first[..., None], -jnp.inf, logits)
    return {
        "logits": logits,
        "argmax": first,
        "margin": best - jnp.max(others, axis=-1),
        "logsumexp": jax.nn.logsumexp(logits, axis=-1),
        "next_logit": jnp.take_along_axis(logits, following[..., None], axis=-1, mode="clip")[..., 0],
    }


def run_jax(
    model: Llama,
    directory: Path,
    *,
    positions: Sequence[int],
    new_tokens: int,
    layers: bool = True,
    chunk: int = 256,
    load_seconds: float = 0.0,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Runs `model` over the tokens and lengths in `directory`, as one padded batch, and writes its `Outputs` there.

    With `layers`, the output of every layer at every position is in memory once: layers · b · t · d numbers.
    """
    tell = progress or (lambda message: None)
    tokens, lengths = np.load(directory / "tokens.npy"), np.load(directory / "lengths.npy")
    config, params, (batch, t) = model.config, model.params(), tokens.shape
    chunk = min(chunk, t)
    arrays = open_arrays(
        *(directory, batch, t, config.num_layers + 2 if layers else 0, len(positions)),
        *(config.hidden_size, config.vocab_size, new_tokens),
    )
    seconds = {"load": load_seconds, "compile": 0.0}

    def compiled(function: Any, *args: Any, **static: Any) -> Any:
        started = time.perf_counter()
        result = function.lower(*args, **static).compile()
        seconds["compile"] += time.perf_counter() - started
        return result

    tell(f"JAX: compiling for {batch} x {t} tokens")
    device_tokens, device_lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    cache = model.init_cache(batch, t + new_tokens) if new_tokens else None
    given = (params, model.layer_patterns, device_tokens, device_lengths, cache)
    prefill = compiled(_prefill, config, *given, keep="hidden" if layers else "nothing")
    tell(f"JAX: prefill of {int(lengths.sum())} tokens")
    started = time.perf_counter()
    x, cache, levels = jax.block_until_ready(prefill(*given))
    seconds["prefill"] = time.perf_counter() - started

    if layers and len(positions):
        rows = np.asarray(positions)
        last = forward.norm(config, x, params["final_norm"])
        for level, hidden in enumerate((forward.embed(config, params, device_tokens), *levels, last)):
            arrays["hidden"][:, level] = np.asarray(hidden[:, rows].astype(jnp.float32))
    del levels
    following = np.roll(tokens, -1, axis=1)
    place = {position: index for index, position in enumerate(positions)}
    score = compiled(_score, config, params, x, jnp.int32(0), jnp.asarray(following[:, :chunk]))
    # The last chunk begins early enough to be whole: one shape, one compilation.
    for start in [*range(0, t - chunk, chunk), t - chunk]:
        scored = score(params, x, jnp.int32(start), jnp.asarray(following[:, start : start + chunk]))
        logits = scored.pop("logits")
        for name, values in scored.items():
            arrays[name][:, start : start + chunk] = np.asarray(values)
        inside = [position for position in range(start, start + chunk) if position in place]
        if inside:
            kept = np.asarray(logits)[:, [position - start for position in inside]]
            arrays["logits"][:, [place[position] for position in inside]] = kept

    seconds["decode"] = 0.0
    if new_tokens:
        tell(f"JAX: {new_tokens} greedy tokens")
        last_token = jnp.asarray(arrays["argmax"][np.arange(batch), np.maximum(lengths, 1) - 1])
        step = compiled(_decode, config, params, last_token, cache)
        started = time.perf_counter()
        for index in range(new_tokens):
            arrays["greedy"][:, index] = np.asarray(last_token)
            if index + 1 < new_tokens:
                logits, cache = step(params, last_token, cache)
                last_token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        seconds["decode"] = time.perf_counter() - started
    for array in arrays.values():
        array.flush()
    (directory / "result.json").write_text(json.dumps({"seconds": seconds}))
