"""The demonstration: a real model reads a real book twice, with dense and with sparse prefill, and answers a question.

A sentence with somebody's address is hidden in the opening chapters of Jane Austen's *Persuasion*. Both runs use the
same weights and tokens; only the attention of the prefill differs.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

import pallas_kernels
from minference_jax.attention import sparse_attention
from minference_jax.data import load_text
from minference_jax.data.needle import NeedlePrompt, needle_prompt
from minference_jax.extras import naming_extra
from minference_jax.models.cache import KVCache
from minference_jax.models.capture import capture_qkv
from minference_jax.models.config import LlamaConfig
from minference_jax.models.llama import Llama
from minference_jax.patterns import HeadPatterns, VerticalSlash
from minference_jax.patterns.files import preset
from minference_jax.patterns.resolve import Patterns, resolve_patterns
from minference_jax.planning.buckets import bucket_length
from minference_jax.text.tokenizer import Tokenizer, load_tokenizer

SEARCHED = "smollm2-135m-instruct"
"""The preset of the demo's model: one pattern for each head, found by `minference-jax search`."""
UNIFORM = VerticalSlash(columns=128, tiles=14, probes="spread")
"""For other models, and prompts of about 4,096 tokens."""
NEW_TOKENS = 24
TIMED_LAYERS = 4


@dataclasses.dataclass(frozen=True)
class Run:
    """One of the two runs. Seconds are wall time of finished results; compilation is counted apart.

    `decode_tokens_per_second` is None for a reply that ended with its first token. `attention_seconds` is attention
    alone, the mean over the first layers, measured on the same queries, keys and values in both runs; the sparse one
    includes finding the index. `reply` ends where the model ends it.
    """

    name: str
    reply: str
    right: bool
    compile_seconds: float
    prefill_seconds: float
    attention_seconds: float
    decode_tokens_per_second: float | None


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """Both runs, and how far the sparse one is from the dense one.

    - `density`: visited / causal cells. `recall`: the share of the dense softmax mass on visited keys, estimated from
      64 rows of each head. Both are means over all heads; `lowest_recall` is that of the worst head.
    - `logit_difference`, `kl`, `same_first_token`: of the logits after the prompt. KL divergence from dense, in nats.
    """

    model: str
    device: str
    prompt_tokens: int
    question: str
    answer: str
    pattern: str
    dense: Run
    sparse: Run
    density: float
    recall: float
    lowest_recall: float
    logit_difference: float
    kl: float
    same_first_token: bool

    @property
    def same_right_answer(self) -> bool:
        """Whether both replies hold the hidden answer."""
        return self.dense.right and self.sparse.right

    def to_dict(self) -> dict[str, Any]:
        """All fields and the verdict, of types that `json.dumps` writes."""
        return dataclasses.asdict(self) | {"same_right_answer": self.same_right_answer}


def run_demo(
    directory: str | Path,
    *,
    tokens: int = 4096,
    depth: float = 0.35,
    seed: int = 0,
    patterns: Patterns = None,
    dtype: str = "",
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> DemoResult:
    """Runs the demonstration with the chat model in `directory`.

    **Arguments:**

    - `tokens`: length of the prompt, at most. `depth`: where the fact lies, from 0 (start) to 1. `seed`: which fact.
    - `patterns`: of the sparse run, as for `Llama.from_pretrained`. Default: the ones that were searched for
      SmolLM2-135M-Instruct, or one for all heads of another model. `dtype`: default float32 on a CPU, bfloat16
      elsewhere.
    - `progress(done, total)` is called between steps; `say` with a line of news.

    Raises what loading the model raises, and `ValueError` where the text is shorter than `tokens`.
    """
    say = say or (lambda line: None)
    steps = iter(range(1, 7))
    step = (lambda: progress(next(steps), 6)) if progress else (lambda: None)

    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    tokenizer = load_tokenizer(directory)
    model = Llama.from_pretrained(directory, dtype=dtype)
    prompt = needle_prompt(tokenizer, load_text(), tokens=tokens, depth=depth, seed=seed)
    step()
    say(f"{len(prompt.ids):,} tokens of Persuasion, with one sentence hidden in it: {prompt.needle.sentence}")

    rows = bucket_length(len(prompt.ids))
    padded = jnp.asarray(np.pad(np.asarray(prompt.ids, np.int32), (0, rows - len(prompt.ids)))[None])
    lengths = jnp.asarray([len(prompt.ids)], jnp.int32)
    config = model.config
    patterns = resolve_patterns(patterns, config.num_layers, config.num_heads) or _default_patterns(config)
    attention = _measure_attention(model, padded, lengths, patterns)
    step()

    runs, logits, info = [], [], None
    for name, network in (("dense", model), ("sparse", model.with_patterns(patterns))):
        run, after_prompt, info = _run(name, network, tokenizer, prompt, padded, lengths, attention[name], step)
        say(f"{name}: {prompt.needle.prefix} {run.reply.strip()}")
        runs.append(run)
        logits.append(after_prompt)
    assert info is not None  # sparse attention reports always
    p, q = (jax.nn.log_softmax(values) for values in logits)
    return DemoResult(
        model=Path(directory).name,
        device=f"{jax.devices()[0].device_kind}, {dtype}",
        prompt_tokens=len(prompt.ids),
        question=prompt.needle.question,
        answer=prompt.needle.answer,
        pattern=_describe(patterns),
        dense=runs[0],
        sparse=runs[1],
        density=float(jnp.mean(info.density)),
        recall=float(jnp.mean(info.recall)),
        lowest_recall=float(jnp.min(info.recall)),
        logit_difference=float(jnp.max(jnp.abs(logits[0] - logits[1]))),
        kl=float(jnp.sum(jnp.exp(p) * (p - q))),
        same_first_token=bool(jnp.argmax(p) == jnp.argmax(q)),
    )


def _run(
    name: str,
    model: Llama,
    tokenizer: Tokenizer,
    prompt: NeedlePrompt,
    padded: Int32[Array, "1 t"],
    lengths: Int32[Array, " 1"],
    attention_seconds: float,
    step: Callable[[], None],
) -> tuple[Run, Float[Array, " vocab"], Any]:
    """Prefill, compiled first, then greedy decoding. Also the logits after the prompt, and what attention reports."""

    config, patterns = model.config, model.patterns

    def prefill(params: dict[str, Array], tokens: Array, lengths: Array, cache: KVCache) -> Any:
        return Llama.from_params(config, params, patterns).prefill(tokens, lengths, cache, return_info=True)

    inputs = model.params(), padded, lengths, model.init_cache(1, padded.shape[1] + NEW_TOKENS)
    started = time.perf_counter()
    compiled = jax.jit(prefill, donate_argnums=3).lower(*inputs).compile()
    compile_seconds = time.perf_counter() - started
    step()
    started = time.perf_counter()
    logits, cache, info = jax.block_until_ready(compiled(*inputs))
    prefill_seconds = time.perf_counter() - started
    after_prompt = logits[0]
    reply: list[int] = []
    seconds: list[float] = []
    while len(reply) < NEW_TOKENS:
        token = int(jnp.argmax(logits[0]))
        reply.append(token)
        if token in tokenizer.eos_token_ids:
            break
        started = time.perf_counter()
        logits, cache = jax.block_until_ready(model.decode(jnp.asarray([token], jnp.int32), cache))
        seconds.append(time.perf_counter() - started)
    step()
    text = tokenizer.decode(reply, skip_special_tokens=True)
    run = Run(
        name=name,
        reply=text,
        right=prompt.found(text),
        compile_seconds=compile_seconds,
        prefill_seconds=prefill_seconds,
        attention_seconds=attention_seconds,
        # The median leaves the step that compiles out. A reply of one token took no step.
        decode_tokens_per_second=1 / float(np.median(seconds)) if seconds else None,
    )
    return run, after_prompt, info


def _default_patterns(config: LlamaConfig) -> HeadPatterns:
    try:
        return preset(SEARCHED, config.num_layers, config.num_heads)
    except ValueError:  # a model of another shape
        return HeadPatterns.uniform(UNIFORM, config.num_layers, config.num_heads)


def _describe(patterns: HeadPatterns) -> str:
    if len(set(itertools.chain(*patterns))) == 1:
        return repr(patterns.layer(0)[0])
    kinds = Counter(type(pattern).__name__ for layer in patterns for pattern in layer)
    return f"one pattern for each head ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})"


def _measure_attention(
    model: Llama, padded: Int32[Array, "1 t"], lengths: Int32[Array, " 1"], patterns: HeadPatterns
) -> dict[str, float]:
    """Seconds a layer of dense and of sparse attention, with the queries, keys and values of the first layers."""
    functions = {
        "dense": jax.jit(lambda q, k, v, _: pallas_kernels.dense_attention(q, k, v, lengths=lengths)),
        "sparse": jax.jit(lambda q, k, v, heads: sparse_attention(q, k, v, heads, lengths=lengths)),
    }
    arrays = patterns.arrays()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for layer, (q, k, v) in enumerate(itertools.islice(capture_qkv(model, padded, lengths), TIMED_LAYERS)):
        heads = arrays.layer(layer)
        jax.block_until_ready((q, k, v))
        for name, function in functions.items():
            if layer == 0:
                jax.block_until_ready(function(q, k, v, heads))  # compiles
            started = time.perf_counter()
            jax.block_until_ready(function(q, k, v, heads))
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.mean(values)) for name, values in seconds.items()}


def report(result: DemoResult) -> Any:
    """A rich renderable: question, both answers, the table."""
    with naming_extra("a table"):
        from rich import box
        from rich.console import Group
        from rich.table import Table

    dense, sparse = result.dense, result.sparse
    table = Table(box=box.SIMPLE_HEAD, title=f"{result.model}, {result.device}, {result.prompt_tokens:,} prompt tokens")
    for heading in ("", "dense", "sparse", "sparse / dense"):
        table.add_column(heading, justify="right" if heading else "left")

    def add(name: str, value: str, field: str) -> None:
        a, b = getattr(dense, field), getattr(sparse, field)
        shown = ("" if x is None else value.format(x) for x in (a, b))
        table.add_row(name, *shown, f"{b / a:.2f}" if a and b else "")

    add("prefill, seconds", "{:.2f}", "prefill_seconds")
    add("attention, seconds a layer", "{:.3f}", "attention_seconds")
    add("compilation, seconds", "{:.1f}", "compile_seconds")
    add("decoding, tokens / second", "{:.1f}", "decode_tokens_per_second")
    table.add_row("density", "100 %", f"{result.density:.1%}", "")
    table.add_row("estimated recall: mean, worst head", "1.000", f"{result.recall:.3f}, {result.lowest_recall:.3f}", "")
    table.add_row("max |Δlogit| after the prompt", "", f"{result.logit_difference:.2f}", "")
    table.add_row("KL divergence, nats", "", f"{result.kl:.4f}", "")
    table.add_row("same most likely token", "", "yes" if result.same_first_token else "no", "")
    right = {True: "right", False: f"wrong, it is {result.answer}"}
    return Group(
        f"\nQuestion: {result.question}",
        f"Dense:    … {dense.reply.strip()}   ({right[dense.right]})",
        f"Sparse:   … {sparse.reply.strip()}   ({right[sparse.right]})\n",
        table,
        f"Sparse heads: {result.pattern}. Attention alone is timed in the first {TIMED_LAYERS} layers.",
    )
