"""The residual stream between blocks, with an addition that is still to be made."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int32

from minference_jax.models.config import LlamaConfig
from minference_jax.models.norms import norm
from pallas_kernels.decode.norm import add_and_norm, unsupported_reason


class Residual(NamedTuple):
    """The residual stream, and what the last block adds to it, not added yet.

    In decoding one kernel adds and normalises: each kernel of a row takes longer to start than to run.
    """

    x: Float[Array, "b t d"]
    added: Float[Array, "b t d"]

    def whole(self) -> Float[Array, "b t d"]:
        """The sum, in the stream's dtype."""
        return self.x + self.added.astype(self.x.dtype)

    def normed(
        self, config: LlamaConfig, weights: Float[Array, "layers d"], layer: Int32[Array, ""]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
        """The sum and its norm, with one layer's of stacked weights."""

        def plain(x: Array, added: Array, weights: Array, layer: Array) -> tuple[Array, Array]:
            x = x + added.astype(x.dtype)
            return x, norm(config, x, jax.lax.dynamic_index_in_dim(weights, layer, keepdims=False))

        def kernel(x: Array, *arrays: Any) -> tuple[Array, Array]:
            return add_and_norm(x, *arrays, eps=config.rms_norm_eps, offset=config.traits.norm_offset)

        x, added = (y.reshape(-1, y.shape[-1]) for y in self)
        if unsupported_reason(x, added, weights) is not None:
            found = plain(x, added, weights, layer)
        else:
            found = jax.lax.platform_dependent(x, added, weights, layer, cuda=kernel, default=plain)
        x, rows = (y.reshape(self.x.shape) for y in found)
        return x, rows
