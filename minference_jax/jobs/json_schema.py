"""Replies that fit a JSON schema: at each step only those tokens are allowed that a fitting text can go on with.

The package llguidance reads schema and tokenizer, and says on the host which tokens these are; the device is given them
as one bit a token. It takes its next step while the host reads the schema on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from minference_jax.extras import naming_extra
from minference_jax.models.cache import KVCache
from minference_jax.models.llama import Llama
from minference_jax.planning.buckets import bucket_length
from minference_jax.text.prompts import PromptRunner, steps_before_new_rope

SPACES: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space of replies: that of Python's `json.dumps`. A model that may write as much as it likes may never end."""


class JsonSchema:
    """A JSON schema for the replies of a model with this tokenizer.

    **Arguments:** `schema`: an object, as `json.loads` gives it; keys of replies come in the order of its properties.
    `tokenizer`: of `load_tokenizer`, a fast one of Hugging Face. `vocab_size`: the model's.

    **Raises:** ValueError for a schema that is none or has keywords that are not supported, for a tokenizer without an
    end, and for one with more tokens than the model; ModuleNotFoundError where llguidance is missing.
    """

    def __init__(self, schema: Any, tokenizer: Any, vocab_size: int):
        with naming_extra("a JSON schema"):
            from llguidance import LLMatcher, LLTokenizer
        fast = getattr(getattr(tokenizer, "hf", None), "backend_tokenizer", None)
        if fast is None or not tokenizer.eos_token_ids:
            raise ValueError("json_schema needs a fast tokenizer of Hugging Face with a token that ends a reply")
        if not isinstance(schema, dict):
            raise ValueError(f"json_schema must be an object, got {type(schema).__name__}")
        self.schema = schema
        try:
            tokens = LLTokenizer(fast.to_str(), n_vocab=vocab_size, eos_token=list(tokenizer.eos_token_ids))
        except ValueError as error:
            raise ValueError(f"json_schema: {error}") from None
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=SPACES)  # pyright: ignore[reportArgumentType]
        if error := LLMatcher.validate_grammar(grammar, tokens):
            raise ValueError(f"json_schema: {error}")
        self._begin = LLMatcher(tokens, grammar)

    def begin(self, rows: int) -> Replies:
        """So many empty replies."""
        return Replies([self._begin.deep_copy() for _ in range(rows)])


class Replies:
    """Replies that are being written: their `tokens`, and which of them are `done`."""

    def __init__(self, matchers: Sequence[Any]):
        self._matchers = matchers
        self.tokens: list[list[int]] = [[] for _ in matchers]
        self.done = np.zeros(len(matchers), bool)

    def allowed(self) -> UInt32[np.ndarray, "b words"]:
        """Which tokens may come next, a bit each, 32 in a word; after a reply that is done, those that end one."""
        return np.stack([np.frombuffer(matcher.compute_bitmask(), np.uint32) for matcher in self._matchers])

    def take(self, chosen: Int32[np.ndarray, " b"]) -> None:
        """Adds a token to each reply that is not done."""
        for row, matcher in enumerate(self._matchers):
            if self.done[row]:
                continue
            if not matcher.consume_token(int(chosen[row])):
                raise RuntimeError(f"json_schema: {matcher.get_error()}")
            self.tokens[row].append(int(chosen[row]))
            self.done[row] = matcher.is_stopped()


def replies_by_schema(
    model: Llama, schema: JsonSchema, tokens: np.ndarray, sizes: np.ndarray, cache: KVCache | None, limit: int
) -> tuple[Replies, KVCache]:
    """Greedy replies of at most `limit` tokens to prompts `[b, t]` of `sizes` `[b]`, and the cache behind them.

    `cache`: holds what the prompts share at their beginning, if it is not None. One program takes every step.
    """
    run = PromptRunner(model, None, None, False, None)
    logits, filled, _ = run(tokens, sizes, cache, bucket_length(limit))
    replies = schema.begin(len(sizes))
    for step in range(limit):
        chosen = _likeliest(logits, jnp.asarray(replies.allowed()))
        token = np.asarray(chosen)
        replies.take(token)
        if replies.done.all() or step + 1 == limit:
            break
        if steps_before_new_rope(model.config, filled, replies.done) == 0:
            logits, filled = run.again(filled, token, replies.done)
        else:
            logits, filled = model.decode(chosen, filled)
    return replies, filled


@jax.jit
def _likeliest(logits: Float[Array, "b vocab"], allowed: UInt32[Array, "b words"]) -> Int32[Array, " b"]:
    """The likeliest of the allowed tokens."""
    ids = jnp.arange(logits.shape[1], dtype=jnp.uint32)
    bit = (jnp.take(allowed, ids // 32, axis=1) >> (ids % 32)) & 1
    return jnp.argmax(jnp.where(bit == 1, logits, -jnp.inf), axis=-1).astype(jnp.int32)
