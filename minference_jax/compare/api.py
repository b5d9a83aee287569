"""compare(): the same weights and tokens through PyTorch and through JAX, and the differences."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from minference_jax.compare.comparison import Comparison, Tolerance, compare_outputs
from minference_jax.compare.outputs import Outputs, write_inputs
from minference_jax.compare.torch_process import find_torch_python, run_torch_jobs
from minference_jax.extras import naming_extra
from minference_jax.patterns import HeadPatterns

__all__ = ["compare", "run_compare"]

MAX_POSITIONS = 2048
"""Positions whose logits are compared unless others are asked for: 400 MB a side for a vocabulary of 49,152."""


def compare(
    model: str | Path,
    prompt: str | Sequence[int] | Int[Any, "b t"],
    *,
    lengths: Int[Any, " b"] | None = None,
    dtype: str = "float32",
    patterns: Any = None,
    fp8_projections: bool = False,
    max_new_tokens: int = 64,
    positions: Sequence[int] | None = None,
    layers: bool = True,
    torch_python: str | Path | None = None,
    attention: str = "sdpa",
    device: str = "cpu",
    threads: int | None = None,
    timeout: float = 3600.0,
    tolerance: Tolerance | None = None,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Runs `model` over `prompt` with Hugging Face PyTorch, in a process of its own, and with JAX.

    PyTorch's run is always dense. With `patterns` ours is sparse, so that the comparison says what sparsity costs.
    PyTorch runs first and ends before JAX begins: they do not share memory or cores.

    Args:
        model: a Hugging Face directory or a GGUF file (PyTorch then gets our conversion of it, so the conversion
            itself is not compared).
        prompt: a text, token ids, or a batch of them: int [b, t], padded on the right.
        lengths: int [b], how many tokens of each row are valid; None for all.
        dtype: of weights and activations on both sides: "float32", "bfloat16" or "float16".
        patterns: as for `Llama.from_pretrained`; None is dense.
        fp8_projections: ours in FP8, so that the comparison says what that costs.
        max_new_tokens: length of the greedy continuations; end-of-text tokens do not end them.
        positions: where hidden states and logits are compared; None: all, or 2,048 evenly spread ones. Everything
            else is compared at all positions.
        layers: whether to compare hidden states, which needs layers x b x t x hidden numbers of memory.
        torch_python: the interpreter that has PyTorch; see `find_torch_python`.
        attention: PyTorch's implementation, "sdpa" or "eager". device: PyTorch's, "cpu" or "cuda".
        threads: of PyTorch; None leaves it to PyTorch. timeout: of PyTorch's whole run, seconds.
        tolerance: what counts as agreement; None: `Tolerance.default`.
        progress: called with each line of news.

    Raises:
        ValueError: for tokens, lengths or positions out of range, an unknown dtype, attention or device, or a
            checkpoint that cannot be read.
        TorchNotFoundError, TorchError: if PyTorch cannot be run, or fails.
    """
    for name, value, allowed in (
        ("dtype", dtype, ("float32", "bfloat16", "float16")),
        ("attention", attention, ("sdpa", "eager")),
        ("device", device, ("cpu", "cuda")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    python = find_torch_python(torch_python)

    import jax

    from minference_jax.checkpoints.convert import open_checkpoint
    from minference_jax.checkpoints.hub import local_checkpoint
    from minference_jax.compare.jax_side import run_jax
    from minference_jax.models.config import LlamaConfig
    from minference_jax.models.llama import Llama
    from minference_jax.patterns.resolve import resolve_patterns
    from minference_jax.planning.auto import AUTO

    model = local_checkpoint(model)
    config = LlamaConfig.from_hf(open_checkpoint(model).config)
    if patterns != AUTO:
        resolve_patterns(patterns, config.num_layers, config.num_heads)
    tokens, lengths = _tokens(model, prompt, lengths, config.vocab_size)
    positions = _positions(positions, tokens.shape[1])
    with tempfile.TemporaryDirectory(prefix="minference-compare-") as scratch:
        ours, theirs = Path(scratch) / "jax", Path(scratch) / "torch"
        write_inputs(ours, tokens, lengths)
        write_inputs(theirs, tokens, lengths)
        job = {"kind": "run", "model": str(_directory_for_torch(model, dtype, Path(scratch))), "output": str(theirs)}
        job |= {"dtype": dtype, "attention": attention, "device": device, "chunk": 256}
        job |= {"positions": positions, "layers": layers, "new_tokens": max_new_tokens}
        versions = run_torch_jobs([job], torch_python=python, timeout=timeout, threads=threads, progress=progress)

        started = time.perf_counter()
        llama = Llama.from_pretrained(model, dtype=dtype, patterns=patterns, fp8_projections=fp8_projections)
        used = llama.patterns_at(tokens.shape[1])
        changed = [] if used is None else [_describe(used)]
        changed += ["FP8 projections"] if fp8_projections else []
        loaded = time.perf_counter() - started
        run_jax(
            *(llama, ours),
            positions=positions,
            new_tokens=max_new_tokens,
            layers=layers,
            load_seconds=loaded,
            progress=progress,
        )
        # Of two Pythons, PyTorch's is the one that is not obvious.
        versions = {"jax": jax.__version__, "on": jax.default_backend()} | versions
        return compare_outputs(
            *(Outputs.load(ours), Outputs.load(theirs)),
            tokens=tokens,
            lengths=lengths,
            positions=positions,
            model=model.name,
            dtype=dtype,
            patterns=" and ".join(changed) or None,
            versions=versions,
            tolerance=tolerance or Tolerance.default(dtype, sparse=bool(changed)),
        )


def _tokens(model: Path, prompt: Any, lengths: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompt as int32 [b, t], and its lengths [b]."""
    if isinstance(prompt, str):
        from minference_jax.text.tokenizer import load_tokenizer

        prompt = load_tokenizer(model).encode(prompt)
    tokens = np.asarray(prompt)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"prompt must be a text or integers [t] or [b, t], got {tokens.dtype} {tokens.shape}")
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
    if lengths.shape != tokens.shape[:1] or lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"lengths must be {len(tokens)} numbers from 1 to {tokens.shape[1]}, got {lengths}")
    tokens = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"prompt has token ids outside 0..{vocab_size - 1}: {tokens.min()} to {tokens.max()}")
    return tokens.astype(np.int32), lengths.astype(np.int32)


def _positions(positions: Sequence[int] | None, t: int) -> list[int]:
    if positions is None:
        return np.linspace(0, t - 1, min(t, MAX_POSITIONS)).round().astype(int).tolist()
    chosen = sorted({int(position) for position in positions})
    if chosen and not 0 <= chosen[0] <= chosen[-1] < t:
        raise ValueError(f"positions must lie in 0..{t - 1}, got {chosen[0]} to {chosen[-1]}")
    return chosen


def _directory_for_torch(model: Path, dtype: str, scratch: Path) -> Path:
    """`model`, or the Hugging Face directory that we make of a GGUF file."""
    from minference_jax.checkpoints.convert import load_checkpoint, open_checkpoint, save_checkpoint

    if open_checkpoint(model).format != "gguf":
        return model
    save_checkpoint(*load_checkpoint(model, dtype=dtype), scratch / "converted")
    return scratch / "converted"


def _describe(patterns: HeadPatterns) -> str:
    """The pattern if all heads have the same one, otherwise how many heads have which kind."""
    heads = [head for layer in patterns for head in layer]
    if len(set(heads)) == 1:
        return repr(heads[0])
    return ", ".join(f"{count} {kind}" for kind, count in Counter(type(head).__name__ for head in heads).most_common())


def run_compare(
    model: str | Path,
    text: str,
    *,
    tokens: int = 2048,
    as_json: bool = False,
    page: Callable[..., None] | None = None,
    **options: Any,
) -> int:
    """The `compare` command: prints a report, or one JSON object, about the first `tokens` tokens of `text`.

    `page(comparison, replies=texts)` is called with what came out, the continuations as texts by side. `options` are
    those of `compare`. News of progress goes to standard error.

    Returns:
        0 if everything is within tolerance, 1 if not. Errors are raised, as `compare` raises them.
    """
    with naming_extra("a report"):
        from rich.console import Console

    from minference_jax.compare.report import comparison_table
    from minference_jax.text.tokenizer import load_tokenizer

    if tokens < 2:
        raise ValueError(f"tokens must be at least 2, got {tokens}")
    find_torch_python(options.get("torch_python"))
    news = Console(stderr=True)
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode(text)
    if len(ids) < tokens:
        news.print(f"The text has {len(ids)} tokens, fewer than {tokens}: comparing all of them.", highlight=False)
    with news.status("Comparing"):
        result = compare(model, ids[:tokens], progress=lambda line: news.print(line, highlight=False), **options)
    if page is not None:
        sides = {"PyTorch": result.greedy_torch, "JAX": result.greedy_ours}
        texts = {name: tokenizer.decode(rows[0]) for name, rows in sides.items() if rows and rows[0]}
        page(result, replies=[texts] if texts else ())
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        Console().print(comparison_table(result))
    return 0 if result.within_tolerance else 1
