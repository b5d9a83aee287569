"""Other attention implementations on inputs of the same shapes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minference_jax.bench.timing import median_ms
from minference_jax.extras import naming_extra

Arrays = tuple[Float[Array, "b t n h"], Float[Array, "b s k h"], Float[Array, "b s k h"]]


def cudnn_dense(arrays: Arrays) -> Callable[[], Float[Array, "b t n h"]]:
    """A call of dense causal attention through cuDNN."""
    attend = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"))
    return lambda: attend(*arrays)


def mosaic_dense(arrays: Arrays, repeats: int = 5) -> float:
    """Milliseconds of JAX's own Mosaic GPU flash attention, dense causal; it serves float16 only."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    half = tuple(x.astype(jnp.float16) for x in arrays)
    attend = jax.jit(lambda q, k, v: attention_mgpu.attention(q, k, v, config))
    return median_ms(lambda: attend(*half), repeats)


def torch_dense(arrays: Arrays, repeats: int = 5) -> float:
    """Milliseconds of PyTorch's scaled_dot_product_attention, dense causal, on arrays of the same shapes."""
    with naming_extra("this peer"):
        import torch  # pyright: ignore[reportMissingImports]

    q, k, v = (torch.randn(x.shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for x in arrays)

    def run() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.cuda.synchronize()

    return median_ms(run, repeats)


def tokamax_dense(arrays: Arrays, repeats: int = 5) -> float:
    """Milliseconds of tokamax's dot_product_attention, dense causal, in the form that it chooses for the GPU."""
    import tokamax  # pyright: ignore[reportMissingImports]

    attend = jax.jit(lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=True))
    return median_ms(lambda: attend(*arrays), repeats)


DENSE_PEERS = {"JAX Mosaic GPU flash (fp16)": mosaic_dense, "torch SDPA": torch_dense, "tokamax": tokamax_dense}
"""Name → timing function of dense peers beside cuDNN. Each raises ImportError where its package is missing."""
