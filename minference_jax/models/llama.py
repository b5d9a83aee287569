"""Llama as a Flax NNX module: parameters, head patterns, and the jitted entry points of the forward pass.

```python
model = Llama.from_pretrained("models/smollm2", dtype="float32", patterns=VerticalSlash(columns=64, tiles=16))
logits = model(tokens, lengths)                       # [b, t, vocab]
last, cache = model.prefill(tokens, lengths, model.init_cache(1, 4096))
last, cache = model.decode(jnp.argmax(last, -1), cache)
```
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from minference_jax.extras import naming_extra
from minference_jax.models import forward, fp8, programs
from minference_jax.models.cache import KVCache, cache_dtype
from minference_jax.models.checks import check_params, check_patterns, check_tokens
from minference_jax.models.config import LlamaConfig
from minference_jax.models.params import param_shapes as param_shapes
from minference_jax.models.prefill import PrefillOptions, prefill, prefill_in_parts
from minference_jax.models.random_weights import random_params
from minference_jax.parallel.deal import deal
from minference_jax.parallel.exchange import ONE, Exchange
from minference_jax.parallel.mesh import fitted
from minference_jax.patterns.heads import HeadPatterns, LayerPatterns
from minference_jax.patterns.resolve import Patterns, resolve_patterns
from minference_jax.planning.auto import AUTO, auto_patterns
from minference_jax.planning.cost import AttentionChoice, choose_attention

with naming_extra("a model"):
    from flax import nnx


class Layers(nnx.Module):
    """The parameters of all layers, stacked: each has a leading layer axis."""

    def __init__(self, params: Mapping[str, Array]):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))


class Llama(nnx.Module):
    """A decoder of the Llama family whose prefill can be sparse.

    - `config`: what it is (static).
    - `patterns`: the pattern (or plan builder) of each head in prefill (static); None for dense attention, or, with
      `auto`, for a pattern by a prompt's length. Decoding is dense.
    - `auto`: dense attention wherever the patterns would not pay at a prompt's length (static); see `planning.cost`.
      `patterns_at` says what a length gets.
    - `embed`, `layers`, `final_norm`, `lm_head`: parameters, named and shaped as in `param_shapes(config)`.
    - `mesh`: the devices that share the work, each with a slice of the weights; None for one device (static).

    Every method is jitted and can be called inside other transformations. Tokens are int32, padded on the right;
    `lengths` (int32 `[b]`, None for no padding) are clipped to the array. Ids outside the vocabulary are clipped too.
    The weights' dtype is that of all activations; norms, RoPE, softmax and logits are float32 inside. The layers'
    projections may be in FP8 instead (`with_fp8_projections`).
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Mapping[str, Array],
        patterns: HeadPatterns | None = None,
        auto: bool = False,
        mesh: Mesh | None = None,
    ):
        check_params(config, params)
        self.config, self.auto = config, auto
        self.exchange = ONE if mesh is None else Exchange(fitted(mesh, config))
        params = self.exchange.place(config, dict(params))
        self.embed = nnx.Param(params["embed"])
        self.layers = Layers(forward.stacked_layers(params))
        self.final_norm = nnx.Param(params["final_norm"])
        if not config.tie_embeddings:
            self.lm_head = nnx.Param(params["lm_head"])
        check_patterns(config, patterns)
        if self.exchange.axis_name is not None and patterns is not None and patterns.builders:
            raise ValueError("patterns: a plan builder sees all heads of a layer, which a mesh divides; use heads=1")
        self.patterns = patterns
        arrays = None if patterns is None or patterns.dense else patterns.arrays()
        self._layer_patterns = nnx.data(self.exchange.place(config, arrays))

    @classmethod
    def from_params(
        cls, config: LlamaConfig, params: Mapping[str, Array], patterns: Patterns = None, mesh: Mesh | None = None
    ) -> Llama:
        """A model of these parameters (not copied, but for what a `mesh` moves to other devices).

        `patterns`: None for dense attention; one pattern or plan builder for all heads; `HeadPatterns`; a pattern's
        text, such as "a-shape:sink=64"; the path of a pattern file or the name of a preset; or "auto": at each
        length the pattern of `planning.auto` where it pays, dense attention where not. Raises `ValueError` listing
        every missing, unexpected or wrongly shaped parameter, or when the patterns are of another number of layers or
        heads.
        """
        if isinstance(patterns, str) and patterns == AUTO:
            return cls(config, params, auto=True, mesh=mesh)
        return cls(config, params, resolve_patterns(patterns, config.num_layers, config.num_heads), mesh=mesh)

    @classmethod
    def random(
        cls,
        config: LlamaConfig,
        key: Array,
        dtype: Any = "float32",
        patterns: Patterns = None,
        mesh: Mesh | None = None,
    ) -> Llama:
        """Random weights: norms of one, biases of zero, matrices of standard deviation 1/√(inputs).

        With a `mesh`, each device makes its slices; they are other numbers than those of one device.
        """
        make = partial(random_params, config, key, jnp.dtype(dtype).name)
        params = make() if mesh is None else Exchange(fitted(mesh, config)).make(config, make)
        return cls.from_params(config, params, patterns, mesh)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        dtype: str = "bfloat16",
        patterns: Patterns = None,
        fp8_projections: bool = False,
        progress: Any = None,
        rope_scaling: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
        download: bool = False,
    ) -> Llama:
        """Loads a Hugging Face directory or a GGUF file; see `minference_jax.checkpoints.convert.load_checkpoint`.

        `path` may be the name of a model, "org/name" or "org/name@revision", in the local cache of the Hugging Face
        hub; with `download`, what is missing there is fetched first.

        `rope_scaling`: instead of the checkpoint's, for longer prompts. `fp8_projections`: see
        `with_fp8_projections`; each projection is quantized as it is read, so the device holds one of them at most in
        `dtype` too. `progress(done, total)` is called as tensors are read. `mesh`: as `on`; each device is given its
        slices as they are read, so that no host and no device ever holds the whole model.
        """
        from minference_jax.checkpoints.convert import load_checkpoint
        from minference_jax.checkpoints.hub import local_checkpoint

        path = local_checkpoint(path, download=download)
        convert = fp8.quantize_param if fp8_projections else None
        options: dict[str, Any] = {"progress": progress, "convert": convert, "rope_scaling": rope_scaling, "mesh": mesh}
        config, params = load_checkpoint(os.fspath(path), dtype=dtype, **options)
        return cls.from_params(config, params, patterns, mesh)

    def with_patterns(self, patterns: Patterns) -> Llama:
        """The same weights (shared, not copied) with other patterns."""
        return Llama.from_params(self.config, self.params(), patterns, self.mesh)

    def on(self, mesh: Mesh | None) -> Llama:
        """This model on the devices of a mesh (`minference_jax.parallel.make_mesh`), each with a slice of the weights.

        All methods and `generate` then run on all of them, with the results of one device: in float32 bit for bit,
        but for decoding, whose sums over devices round differently. None: on one device again. Raises `ValueError`
        for a mesh that does not divide the heads, and names those that do.
        """
        params = self.params()
        if mesh is None:
            params = {name: jax.device_put(value, jax.devices()[0]) for name, value in params.items()}
        return Llama(self.config, params, self.patterns, self.auto, mesh)

    @property
    def mesh(self) -> Mesh | None:
        """The devices that share the work; None for one."""
        return self.exchange.mesh

    def with_fp8_projections(self) -> Llama:
        """This model with the projections of its layers in FP8 (`models.fp8`); all else is shared, not copied.

        About half the time and half the memory of those weights on a Hopper GPU; elsewhere only the rounding.
        """
        return Llama(self.config, fp8.quantize_params(self.params()), self.patterns, self.auto, self.mesh)

    @property
    def fp8_projections(self) -> bool:
        """Whether the projections of the layers are in FP8."""
        return hasattr(self.layers, "wq_scale")

    def params(self) -> dict[str, Array]:
        """Name → array of every parameter, in the order of `param_shapes` (FP8 weights with their scales)."""
        shapes = param_shapes(self.config)
        names = fp8.fp8_shapes(shapes) if self.fp8_projections else shapes
        owners = {name: self.layers if name.startswith("layers.") else self for name in names}
        return {name: getattr(owner, name.removeprefix("layers."))[...] for name, owner in owners.items()}

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights and activations."""
        return self.embed[...].dtype

    @property
    def layer_patterns(self) -> LayerPatterns | None:
        """The patterns as arrays with leading axes `[layers, heads]`; None when all is dense."""
        return self._layer_patterns

    def attention_choice(self, rows: int, keys: int | None = None) -> AttentionChoice | None:
        """With `auto`, what prefill of `rows` tokens at the end of `keys` (default: as many) does; else None."""
        if not self.auto:
            return None
        keys = rows if keys is None else keys
        return choose_attention(self.config, self._sparse_patterns(keys), rows, keys)

    def patterns_at(self, rows: int, keys: int | None = None) -> HeadPatterns | None:
        """The patterns of prefill of `rows` tokens at the end of `keys` (default: as many); None where dense."""
        if not self.auto:
            return self.patterns
        keys = rows if keys is None else keys
        choice = self.attention_choice(rows, keys)
        return None if choice is None or choice.dense else self._sparse_patterns(keys)

    def _sparse_patterns(self, keys: int) -> HeadPatterns:
        return self.patterns or auto_patterns(self.config.num_layers, self.config.num_heads, keys)

    def patterns_for(self, rows: int, keys: int | None = None) -> LayerPatterns | None:
        """`patterns_at` as arrays."""
        if not self.auto:
            return self._layer_patterns
        found = self.patterns_at(rows, keys)
        return None if found is None else self.exchange.place(self.config, found.arrays())

    def order(self, tokens: int) -> Int32[Array, "layers k"] | None:
        """The KV groups of each layer as the devices of a mesh attend for them, where that makes them more even."""
        if self.mesh is None or self.config.traits.sinks:  # sinks are where the model's order puts their heads
            return None
        found = deal(self.config, self.patterns_at(tokens), tokens, self.exchange.heads)
        return None if found is None else self.exchange.place(self.config, jnp.asarray(found))

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> KVCache:
        """An empty KV cache for `batch` sequences of up to `length` tokens.

        `dtype`: None for the model's; "fp8" (float8_e4m3fn) or "int8" for half the memory of 16-bit numbers.
        """
        empty = partial(KVCache.empty, self.config, batch, length, cache_dtype(dtype, self.dtype))
        return empty() if self.mesh is None else self.exchange.make(self.config, empty)

    def __call__(
        self,
        tokens: Int32[Array, "b t"],
        lengths: Int32[Array, " b"] | None = None,
        *,
        implementation: str | None = None,
    ) -> Float[Array, "b t vocab"]:
        """float32 logits of every position, `[b, t, vocab]`; those of padding mean nothing.

        `implementation` (static): of attention. Differentiable in the parameters, also with sparse patterns;
        not with FP8 projections.
        """
        arrays = self.patterns_for(jnp.shape(tokens)[-1])
        inputs = (self.params(), arrays, *self._inputs(tokens, lengths))
        return programs.ALL_LOGITS(self.config, *inputs, exchange=self.exchange, implementation=implementation)

    def _inputs(self, tokens: Any, lengths: Any) -> tuple[Int32[Array, "b t"], Int32[Array, " b"]]:
        """Checked tokens and lengths, where the devices want them."""
        return self.exchange.place(self.config, check_tokens(tokens, lengths))

    def hidden_states(
        self, tokens: Int32[Array, "b t"], lengths: Int32[Array, " b"] | None = None
    ) -> Float[Array, "levels b t d"]:
        """Embeddings, the output of each layer, and the output of the final norm: layers + 2 levels."""
        arrays = self.patterns_for(jnp.shape(tokens)[-1])
        inputs = (self.params(), arrays, *self._inputs(tokens, lengths))
        return programs.HIDDEN_STATES(self.config, *inputs, exchange=self.exchange)

    @overload
    def token_log_likelihoods(
        self,
        tokens: Int32[Array, "b t"],
        lengths: Int32[Array, " b"] | None = None,
        *,
        implementation: str | None = None,
        return_info: Literal[False] = False,
    ) -> Array: ...
    @overload
    def token_log_likelihoods(
        self,
        tokens: Int32[Array, "b t"],
        lengths: Int32[Array, " b"] | None = None,
        *,
        implementation: str | None = None,
        return_info: Literal[True],
    ) -> tuple[Array, Any]: ...
    def token_log_likelihoods(
        self,
        tokens: Int32[Array, "b t"],
        lengths: Int32[Array, " b"] | None = None,
        *,
        implementation: str | None = None,
        return_info: bool = False,
    ) -> Any:
        """log p of each token given those before it, float32 `[b, t]`; 0 for the first one and for padding.

        The logits of a few rows exist at a time, so this costs no more memory than a prefill. With `return_info`
        also what `prefill` returns then: the `AttentionInfo` of all layers, None for dense attention.
        `implementation` (static): of attention. Differentiable in the parameters but for FP8 projections, so
        its mean is a loss to train with.
        """
        arrays = self.patterns_for(jnp.shape(tokens)[-1])
        inputs = (self.params(), arrays, *self._inputs(tokens, lengths))
        static: dict[str, Any] = {"implementation": implementation, "return_info": return_info}
        scores, info = programs.LOG_LIKELIHOODS(self.config, *inputs, exchange=self.exchange, **static)
        return (scores, info) if return_info else scores

    @overload
    def prefill(
        self,
        tokens: Int32[Array, "b t"],
        lengths: Int32[Array, " b"] | None = None,
        cache: KVCache | None = None,
        *,
        return_info: Literal[False] = False,
        **options: Unpack[PrefillOptions],
    ) -> tuple[Array, Any]: ...
    @overload
    def prefill(
        self,
        tokens: Int32[Array, "b t"],
        lengths: Int32[Array, " b"] | None = None,
        cache: KVCache | None = None,
        *,
        return_info: Literal[True],
        **options: Unpack[PrefillOptions],
    ) -> tuple[Array, Any, Any]: ...
    def prefill(
        self,
        tokens: Int32[Array, "b t"],
        lengths: Int32[Array, " b"] | None = None,
        cache: KVCache | None = None,
        *,
        start: int | Int32[Array, ""] | None = None,
        rope_lengths: Int32[Array, " b"] | None = None,
        chunk: int | None = None,
        rows_at_once: int | None = None,
        implementation: str | None = None,
        return_info: bool = False,
    ) -> Any:
        """Processes a prompt, or the part of it that begins at position `start`.

        **Arguments:**

        - `tokens`: the prompts, or their rows at positions `start` … `start + t - 1`.
        - `lengths`: of the whole sequences, those rows included (None: `start + t`).
        - `cache`: filled and returned; **its buffers are given up** (donated), so do not use it again. None keeps
          nothing, which a single prompt's logits need no more of.
        - `start`: None or 0 for a whole prompt. Otherwise a multiple of 128, an int or a traced int32 scalar, shared
          by all sequences; the cache must hold every earlier position. A traced `start` is rounded down to one
          that is, and leaves room for `t` rows in the cache. To continue from a position between, feed up to 127
          tokens again.
        - `rope_lengths`: int32 `[b]`, for RoPE that depends on the sequence length ("dynamic", "longrope"): the
          length to assume, where a prompt comes in parts. Default: `lengths` up to these rows, as one call would see.
        - `chunk`: feed the tokens in parts of so many (a multiple of 128) against the cache, one part after another:
          memory is then bounded by the part. Needs a cache; `start` must be None or an int. See `models.parts`.
        - `rows_at_once` (static): rows of projections and MLP at once, by default 16,384 of each sequence, or all where
          there are no more than 32,768. `implementation` (static): of attention.

        **Returns:** float32 logits `[b, vocab]` of each sequence's last token (of a sequence that ends outside these
        rows, they mean nothing) and the cache. With `return_info` (static) also the `AttentionInfo` of all layers,
        with leading layer axis: density and estimated recall `[layers, b, n]`; None for dense attention. With `chunk`,
        a tuple of them, one a part.
        """
        options = {"rows_at_once": rows_at_once, "implementation": implementation, "return_info": return_info}
        if chunk is None:
            return prefill(self, tokens, lengths, cache, start=start, rope_lengths=rope_lengths, **options)
        places = {"chunk": chunk, "start": start, "rope_lengths": rope_lengths}
        return prefill_in_parts(self, tokens, lengths, cache, **places, **options)

    def decode(self, tokens: Int32[Array, " b"], cache: KVCache) -> tuple[Float[Array, "b vocab"], KVCache]:
        """Appends one token to each sequence of the cache: float32 logits `[b, vocab]` and the cache, one longer.

        Attention is dense. The cache that is passed in is donated. A sequence whose cache is full stays as it is.
        """
        if jnp.shape(tokens) != cache.lengths.shape:
            raise ValueError(f"tokens must have shape {cache.lengths.shape} to fit the cache, got {jnp.shape(tokens)}")
        tokens = self.exchange.place(self.config, jnp.asarray(tokens, jnp.int32))
        return programs.decode(self.config, self.params(), tokens, cache, self.exchange)
