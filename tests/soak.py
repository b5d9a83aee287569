"""Random conversations with a small model: what `test_soak.py` runs, and what a fresh process runs to compare.

python tests/soak.py FIRST END KINDS      prints the answers as JSON, the conversations taken in the opposite order
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from minference_jax import Llama, LlamaConfig, generate

CONFIG = LlamaConfig(61, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
ROOM = 256  # longest conversation: every call of a kind then has one of two shapes


@dataclass(frozen=True)
class Kind:
    """Calls that share their programs."""

    batch: int
    shortest: int  # of the first prompts: with 129 and more, a follow-up finds a whole tile in the cache
    longest: int
    pattern: str | None = None
    cache_dtype: str | None = None
    chunk: int | None = None


KINDS = (
    Kind(2, 129, 180, "a-shape:sink=2,window=70", "int8"),
    Kind(1, 1, 60),
    Kind(3, 1, 60, "vertical-slash:columns=3,slashes=3"),
    Kind(1, 129, 180, "block-sparse:blocks=1", "fp8"),
    Kind(2, 129, 180, "shared-density:density=0.7,every=64", chunk=128),
    Kind(1, 129, 180, "per-tile:every=64,threshold=0.001"),
)


class CancelledError(Exception):
    """What a caller raises in the middle of an answer."""


class Soak:
    """Conversations of one to three turns, decided by their number alone."""

    def __init__(self, kinds: int):
        self.kinds = KINDS[:kinds]
        self.models = [Llama.random(CONFIG, jax.random.key(0), patterns=kind.pattern) for kind in self.kinds]

    def conversation(self, number: int) -> Iterator[list[list[int]] | None]:
        """The answer of each call; None of a call that was cancelled, which ends the conversation."""
        rng = np.random.default_rng(number)
        kind, model = (them[number % len(self.kinds)] for them in (self.kinds, self.models))
        sizes = rng.integers(kind.shortest, kind.longest + 1, kind.batch)
        prompts = [rng.integers(0, CONFIG.vocab_size, size).tolist() for size in sizes]
        cache = None
        for _ in range(int(rng.integers(1, 4))):
            answer = self._call(rng, kind, model, prompts, cache)
            yield None if answer is None else answer.sequences()
            if answer is None:
                return
            cache = answer.cache
            more = [rng.integers(0, CONFIG.vocab_size, rng.integers(1, 20)).tolist() for _ in prompts]
            prompts = [a + b + c for a, b, c in zip(prompts, answer.sequences(), more, strict=True)]
            assert max(map(len, prompts)) <= ROOM

    def _call(self, rng: np.random.Generator, kind: Kind, model: Llama, prompts: Any, cache: Any) -> Any:
        tokens, temperature, seed = int(rng.integers(1, 9)), float(rng.choice([0.0, 0.8])), int(rng.integers(1 << 30))
        cancelled, offload = rng.random() < 0.15, rng.random() < 0.2
        heard = []

        def stream(new: list[list[int]]) -> None:
            heard.append(new)
            if cancelled and len(heard) == 2:
                raise CancelledError

        options: dict[str, Any] = {"cache_dtype": kind.cache_dtype, "prefill_chunk": kind.chunk, "offload": offload}
        try:
            return generate(
                *(model, prompts),
                max_new_tokens=tokens,
                temperature=temperature,
                top_p=0.9,
                key=seed,
                cache=cache,
                stream=stream if cancelled or rng.random() < 0.5 else None,
                **options,
            )
        except CancelledError:
            return None

    def answers(self, calls: int, first: int) -> Iterator[tuple[int, list[Any]]]:
        """Conversations from number `first` on with so many calls in all, and their numbers."""
        number = first
        while calls > 0:
            found = list(self.conversation(number))
            yield number, found
            number, calls = number + 1, calls - len(found)


def resident_bytes() -> int:
    """Memory of this process that is in use, after what is free has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    first, end, kinds = map(int, sys.argv[1:])
    soak = Soak(kinds)
    print(json.dumps({number: list(soak.conversation(number)) for number in reversed(range(first, end))}))
