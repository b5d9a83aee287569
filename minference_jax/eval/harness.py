"""A model for EleutherAI's lm-evaluation-harness, with sparse prefill.

```python
import lm_eval

model, tokenizer = Llama.from_pretrained(path, patterns="auto"), load_tokenizer(path)
results = lm_eval.simple_evaluate(harness_model(model, tokenizer), tasks=["lambada_openai"], limit=100)
```

Contexts are prefilled, and continuations decoded after them, as in generation: a sparse pattern sees the contexts only.
Rolling likelihoods are those of one pass over each window, sparse in all of it. Needs lm-eval
(`pip install 'minference-jax[harness]'`), which brings no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from minference_jax.eval.runner import padded
from minference_jax.extras import naming_extra
from minference_jax.jobs.choices import continuation_scores
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama
from minference_jax.planning.buckets import bucket_length
from minference_jax.text.prompts import PromptRunner


class HarnessRequests:
    """The three kinds of requests, on texts; needs no lm-eval.

    - `batch`: prompts at once. `max_length`: tokens of a prompt and what follows, the model's context by default, or
      4,096 where it says none; longer contexts lose their beginning.
    - `max_new_tokens`: of a reply, where the task does not say.
    """

    def __init__(
        self, model: Llama, tokenizer: Any, *, batch: int = 8, max_length: int | None = None, max_new_tokens: int = 256
    ):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.max_length = max_length or model.config.context_length or 4096
        self.max_new_tokens = max_new_tokens
        if batch < 1 or self.max_length < 2 or max_new_tokens < 1:
            numbers = f"{batch}, {self.max_length} and {max_new_tokens}"
            raise ValueError(f"batch, max_length and max_new_tokens must be at least 1, 2 and 1, got {numbers}")
        beginnings = [model.config.bos_token_id, *tokenizer.eos_token_ids]
        self.prefix = next((token for token in beginnings if token is not None), 0)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p of the continuation, and whether greedy decoding writes it."""
        split = [self._split(*pair) for pair in pairs]
        groups: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}  # a context is prefilled once
        for context, continuation in split:
            groups.setdefault(context, {})[continuation] = None
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, bool]] = {}
        for rows in self._batches(groups):
            labels = [list(groups[row]) for row in rows]
            full = labels + [labels[-1]] * (self.batch - len(rows))
            shape = _power(max(map(len, labels))), _power(max(len(label) for row in labels for label in row))
            tokens, sizes = padded(rows, self.batch)
            run = PromptRunner(self.model, None, None, False, None)
            logits, cache, _ = run(tokens, sizes, None, bucket_length(shape[1]))
            totals, greedy = continuation_scores(self.model, logits, cache, full, room=shape)
            scores = np.asarray(totals)
            for place, row in enumerate(rows):
                for number, label in enumerate(labels[place]):
                    found[row, label] = float(scores[place, number]), bool(greedy[place, number])
        return [found[pair] for pair in split]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """log p of each whole text. A longer one than `max_length` tokens is read in windows, each token scored once:
        a window begins with the last token before it, and the last window reaches back as far as it may."""
        windows: list[tuple[int, tuple[int, ...], int]] = []  # text, tokens, the first that is scored
        for number, text in enumerate(texts):
            ids = (self.prefix, *self.tokenizer.encode(text, add_special_tokens=False))
            for first in range(1, len(ids), self.max_length):
                end = min(first + self.max_length, len(ids))
                begin = max(0, end - 1 - self.max_length)
                windows.append((number, ids[begin:end], first - begin))
        scores: dict[tuple[int, ...], np.ndarray] = {}
        for rows in self._batches(dict.fromkeys(row for _, row, _ in windows)):
            tokens, sizes = padded(rows, self.batch)
            found = self.model.token_log_likelihoods(jnp.asarray(tokens), jnp.asarray(sizes))
            scores |= dict(zip(rows, np.asarray(found, np.float64), strict=False))
        totals = [0.0] * len(texts)
        for number, row, first in windows:
            totals[number] += float(scores[row][first : len(row)].sum())
        return totals

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """A reply to each (context, settings): up to `max_gen_toks` tokens, cut before the first text of `until`.

        Other settings that are read: `do_sample`, `temperature`, `top_p`.
        """
        asked = [(self._ids(context), _settings(settings, self.max_new_tokens)) for context, settings in requests]
        replies: dict[tuple[tuple[int, ...], int, float, float], str] = {}
        kinds = dict.fromkeys(settings[:3] for _, settings in asked)
        for new, temperature, top_p in kinds:
            room = max(1, self.max_length - new)
            own = dict.fromkeys(ids[-room:] for ids, settings in asked if settings[:3] == (new, temperature, top_p))
            for rows in self._batches(own):
                tokens, sizes = padded(rows, self.batch)
                options: dict[str, Any] = {"max_new_tokens": new, "temperature": temperature, "top_p": top_p}
                options["eos_token_ids"] = self.tokenizer.eos_token_ids
                answer = generate(self.model, tokens, sizes, **options)
                for row, ids in zip(rows, answer.sequences(), strict=False):
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    replies[row, new, temperature, top_p] = text
        texts = []
        for ids, (new, temperature, top_p, ends) in asked:
            text = replies[ids[-max(1, self.max_length - new) :], new, temperature, top_p]
            texts.append(text[: min((text.find(end) for end in ends if end in text), default=len(text))])
        return texts

    def _ids(self, text: str) -> tuple[int, ...]:
        """A context; an empty one is the token that begins texts. A chat template has written that already."""
        bos = self.tokenizer.decode([self.prefix])
        return tuple(self.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))) or (
            self.prefix,
        )

    def _split(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of both, cut where the context's own ids end. White space at its end belongs to the continuation."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        before = self._ids(kept)
        whole = (
            self._ids(kept + continuation)
            if kept
            else before + tuple(self.tokenizer.encode(continuation, add_special_tokens=False))
        )
        after = whole[len(before) :] or whole[-1:]
        if len(after) >= self.max_length:
            raise ValueError(f"a continuation of {len(after)} tokens does not fit max_length {self.max_length}")
        return whole[: len(whole) - len(after)][-(self.max_length - len(after)) :], after

    def _batches(self, rows: Mapping[tuple[int, ...], Any]) -> list[list[tuple[int, ...]]]:
        """Rows of one bucket together, up to `batch` of them."""
        buckets: dict[int, list[tuple[int, ...]]] = {}
        for row in rows:
            buckets.setdefault(bucket_length(len(row)), []).append(row)
        return [own[i : i + self.batch] for own in buckets.values() for i in range(0, len(own), self.batch)]


def harness_model(model: Llama, tokenizer: Any, **options: Any) -> Any:
    """The `lm_eval.api.model.LM` for `lm_eval.simple_evaluate`. `options`: of `HarnessRequests`.

    Raises ModuleNotFoundError where lm-eval is not installed.
    """
    with naming_extra("the adapter"):
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    class HarnessModel(LM):
        """Hands an LM's requests on."""

        def __init__(self) -> None:
            super().__init__()
            self.requests = HarnessRequests(model, tokenizer, **options)

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return self.requests.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return self.requests.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Any) -> list[str]:
            return self.requests.generate_until([request.args for request in requests])

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return tokenizer.hf.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.hf.name_or_path)

        def chat_template(self, chat_template: Any = False) -> str:
            return str(tokenizer.hf.chat_template or "")

    return HarnessModel()


def _settings(settings: Mapping[str, Any], most: int) -> tuple[int, float, float, tuple[str, ...]]:
    ends = settings.get("until") or ()
    temperature = float(settings.get("temperature") or 0.0)
    if settings.get("do_sample") is False:
        temperature = 0.0
    new = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or most)
    return new, temperature, float(settings.get("top_p") or 1.0), (ends,) if isinstance(ends, str) else tuple(ends)


def _power(number: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (number - 1).bit_length()
