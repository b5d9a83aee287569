"""`generate`: a prompt in, its continuation out as it comes."""

from __future__ import annotations

import contextlib
import json as json_text
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from minference_jax.cli.completion import complete_dtype, complete_pattern
from minference_jax.cli.console import (
    chosen_dtype,
    print_json,
    read_full_text,
    read_text,
    refuse,
    stderr,
    stdout,
    usage,
    usage_error,
)
from minference_jax.cli.lengths import length_option
from minference_jax.cli.mesh import HOSTS_HELP, MESH_HELP, check_mesh, start_mesh
from minference_jax.cli.progress import progress
from minference_jax.patterns.describe import describe_patterns
from minference_jax.patterns.resolve import resolve_patterns
from minference_jax.patterns.text import PATTERN_HELP
from minference_jax.runs.files import strict_json

WRITING = "Writing the reply"


OF_TEXT = (
    *("prompt", "file", "question", "system", "reply_prefix", "raw", "temperature", "top_p", "seed"),
    *("template", "template_variable", "rope_scaling", "strict", "stats"),
)
"""Parameters of a prompt that is a text, and of sampling."""


def generate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or a .gguf file; see --random-weights.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")] = "",
    file: Annotated[list[str] | None, typer.Option(help="Put before the prompt; repeatable; - is stdin.")] = None,
    question: Annotated[str, typer.Option(help="Put after the files and the prompt.")] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    reply_prefix: Annotated[str, typer.Option(help="How the reply begins.")] = "",
    raw: Annotated[bool, typer.Option(help="Continue the text itself, without the chat template.")] = False,
    pattern: Annotated[
        str,
        typer.Option(
            help=f"How heads attend in prefill: {PATTERN_HELP} auto is sparse where that pays.",
            autocompletion=complete_pattern,
        ),
    ] = "dense",
    max_new_tokens: Annotated[int, length_option(help="Of the reply, at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU.", autocompletion=complete_dtype),
    ] = "",
    prefill_chunk: Annotated[
        int | None, length_option(least=128, help="Prefill in parts of so many tokens, a multiple of 128.")
    ] = None,
    cache: Annotated[str, typer.Option(help="Numbers of the KV cache: model (the dtype), fp8 or int8.")] = "model",
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Projections in FP8: faster on Hopper GPUs, a little less true.")
    ] = False,
    random_weights: Annotated[
        int,
        length_option(
            least=0,
            help="Run so many random tokens through random weights; MODEL is then a config.json, or "
            "llama-3-8b, llama-3.1-8b, qwen2-7b, smollm2.",
        ),
    ] = 0,
    template: Annotated[str, typer.Option(help="The name of a chat template, where there are several.")] = "",
    template_variable: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE for the chat template, e.g. enable_thinking=false; VALUE may be JSON; repeatable."
        ),
    ] = None,
    rope_scaling: Annotated[
        str, typer.Option(help='JSON to use as the model\'s rope_scaling, e.g. {"rope_type":"yarn","factor":2.0}.')
    ] = "",
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail, rather than warn, if the prompt and reply exceed the context.")
    ] = False,
    mesh: Annotated[str, typer.Option(help=MESH_HELP)] = "",
    hosts: Annotated[str, typer.Option(help=HOSTS_HELP)] = "",
    stats: Annotated[bool, typer.Option(help="Print tokens, times and density on standard error.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Answer a prompt, or a question about files, with dense or sparse prefill.

    Example: minference-jax generate DIR --file book.txt --question "Who is Anne?" --pattern auto
    """
    files = file or []
    if random_weights:
        refuse(ctx, "with --random-weights, whose prompt is random and whose reply is greedy", *OF_TEXT)
        shared = start_mesh(mesh, hosts)
        _random(model, random_weights, pattern, dtype, max_new_tokens, cache, fp8, prefill_chunk, json, shared)
        return
    if not (prompt or files or question):
        raise usage_error("give a prompt, --file or --question")
    dtype = dtype and chosen_dtype(dtype)  # without one the device decides, which hosts agree on first
    if cache not in ("model", "fp8", "int8"):
        raise usage_error(f"--cache must be model, fp8 or int8, got {cache!r}")
    if [*files, prompt].count("-") > 1:
        raise usage_error("standard input can be read once only")
    if raw:
        refuse(ctx, "with --raw", "system", "reply_prefix", "template", "template_variable")
    if temperature == 0:
        refuse(ctx, "without --temperature above 0", "top_p", "seed")
    text = "\n\n".join(
        filter(None, [*map(read_full_text, files), read_text("-") if prompt == "-" else prompt, question])
    )

    shared = start_mesh(mesh, hosts)
    dtype = chosen_dtype(dtype)
    _check_settings(max_new_tokens, temperature, top_p, prefill_chunk, cache, dtype)
    from minference_jax.checkpoints.hf_files import unused_settings
    from minference_jax.models.generate import generate as continue_tokens
    from minference_jax.models.requests import check_context, check_prompts, random_key
    from minference_jax.text.tokenizer import load_tokenizer

    with usage("--seed"):
        key = random_key(seed)
    scaling = _json_option("--rope-scaling", rope_scaling) if rope_scaling else None
    variables = dict(map(_variable, template_variable or []))
    config, patterns = check_model(Path(model), pattern, scaling)
    check_mesh(shared, config)
    with _plain_warnings():
        if unused := unused_settings(Path(model)):
            warnings.warn(f"generation_config.json asks for {unused}, which is not done here", stacklevel=1)
        tokenizer = load_tokenizer(model)
        ids = tokenizer.encode(text) if raw else _chat(tokenizer, text, system, reply_prefix, template, variables)
        check_prompts([ids], None, config.vocab_size)
        check_context(config, len(ids), max_new_tokens, strict)
    network = load_model(Path(model), patterns, dtype, fp8, scaling, shared)
    decoder = tokenizer.stream()

    with progress("Reading the prompt") as work, warnings.catch_warnings():

        def write(new: list[list[int]]) -> None:
            if work.label != WRITING:
                work.becomes(WRITING)  # the bar goes before the first token comes
            print("".join(map(decoder.push, new[0])), end="", flush=True)

        warnings.simplefilter("ignore", UserWarning)  # said above
        result = continue_tokens(
            network,
            [ids],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            key=key,
            eos_token_ids=tokenizer.eos_token_ids,
            cache_dtype=cache,
            prefill_chunk=prefill_chunk,
            progress=work,
            stream=None if json else write,
            return_info=True,
        )
    sequence = result.sequences()[0]
    ended = sequence[-1] in tokenizer.eos_token_ids
    if not json:
        print(decoder.end(), flush=True)
        if not ended:
            stderr().print(f"The reply is cut at {max_new_tokens:,} tokens (--max-new-tokens).")
    figures = _figures(result, _described(network, patterns, len(ids), prefill_chunk, result.cache.capacity), network)
    if json:
        reply = tokenizer.decode(sequence, skip_special_tokens=True)
        print_json({"text": reply, "tokens": sequence, "finish": "eos" if ended else "length", **figures})
    elif stats:
        _print_figures(figures, stderr())


def _check_settings(
    max_new_tokens: int, temperature: float, top_p: float, prefill_chunk: int | None, cache: str, dtype: str
) -> None:
    """Ends with status 2 for a setting that `generate` would refuse, which it does once weights are there."""
    from minference_jax.models.cache import cache_dtype
    from minference_jax.models.requests import check_numbers

    with usage("settings"):
        check_numbers(max_new_tokens, temperature, top_p, prefill_chunk)
        cache_dtype(cache, chosen_dtype(dtype))


def check_model(path: Path, pattern: str, rope_scaling: Any = None) -> tuple[Any, Any]:
    """The config and the patterns, from the headers of a checkpoint: what can be wrong before weights are read."""
    from minference_jax.checkpoints.convert import open_checkpoint
    from minference_jax.checkpoints.hf_files import check_config

    files = open_checkpoint(path)
    config = check_config(files.path, files.config | ({"rope_scaling": rope_scaling} if rope_scaling else {}))
    with usage("--pattern"):
        patterns = pattern if pattern == "auto" else resolve_patterns(pattern, config.num_layers, config.num_heads)
    return config, patterns


def load_model(
    path: Path, patterns: Any, dtype: str, fp8: bool = False, rope_scaling: Any = None, mesh: Any = None
) -> Any:
    """The model with its weights, on one device or a mesh."""

    from minference_jax.models.llama import Llama

    dtype = chosen_dtype(dtype)
    with progress("Loading weights") as update:
        options: dict[str, Any] = {"fp8_projections": fp8, "progress": update, "rope_scaling": rope_scaling}
        options["mesh"] = mesh
        return Llama.from_pretrained(path, dtype=dtype, patterns=patterns, **options)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as lines of standard error, without a place in the source; each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        stderr().print(f"warning: {warning.message}", markup=False)


def _variable(option: str) -> tuple[str, Any]:
    """NAME=VALUE; a value that is JSON means what it says, any other is text."""
    name, equals, value = option.partition("=")
    if not (name.isidentifier() and equals):
        raise usage_error(f"--template-variable takes NAME=VALUE, got {option!r}")
    try:
        return name, json_text.loads(value)
    except ValueError:
        return name, value


def _json_option(name: str, text: str) -> dict[str, Any]:
    try:
        value = strict_json(text)
    except ValueError as error:
        raise usage_error(f"{name} takes a JSON object: {error}; got {text!r}") from None
    if not isinstance(value, dict):
        raise usage_error(f"{name} takes a JSON object, got {text!r}")
    return value


def _random(
    name: str,
    tokens: int,
    pattern: str,
    dtype: str,
    max_new_tokens: int,
    cache: str,
    fp8: bool,
    prefill_chunk: int | None,
    as_json: bool,
    mesh: Any,
) -> None:
    """Random tokens through random weights of a real model's shape: what a prompt of that length takes."""
    import jax
    import numpy as np

    from minference_jax.checkpoints.presets import known_config
    from minference_jax.models.generate import generate as continue_tokens
    from minference_jax.models.llama import Llama

    config = known_config(name)
    with usage("--pattern"):
        patterns = pattern if pattern == "auto" else resolve_patterns(pattern, config.num_layers, config.num_heads)
    dtype = chosen_dtype(dtype)
    _check_settings(max_new_tokens, 0.0, 1.0, prefill_chunk, cache, dtype)
    check_mesh(mesh, config)
    network = Llama.random(config, jax.random.key(0), dtype, patterns, mesh)
    network = network.with_fp8_projections() if fp8 else network
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, (1, tokens))
    with progress("Reading the prompt") as update:
        result = continue_tokens(
            network,
            prompt,
            max_new_tokens=max_new_tokens,
            eos_token_ids=(),
            cache_dtype=cache,
            prefill_chunk=prefill_chunk,
            progress=update,
        )
    figures = _figures(result, _described(network, patterns, tokens, prefill_chunk, result.cache.capacity), network)
    if as_json:
        print_json({"tokens": result.sequences()[0], **figures})
    else:
        _print_figures(figures, stdout())


def _described(network: Any, patterns: Any, tokens: int, chunk: int | None, capacity: int) -> str:
    """The patterns, or what "auto" chose: parts attend to the whole cache, one call to the prompt itself."""
    from minference_jax.planning.buckets import bucket_length

    rows = bucket_length(tokens)
    in_parts = chunk is not None and chunk < rows
    choice = network.attention_choice(chunk if in_parts else rows, capacity if in_parts else rows)
    return describe_patterns(patterns) if choice is None else f"auto: {choice}"


def _chat(
    tokenizer: Any, text: str, system: str, reply_prefix: str, template: str, variables: dict[str, Any]
) -> list[int]:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    if reply_prefix:
        messages.append({"role": "assistant", "content": reply_prefix})
    options = {"continue_final_message": bool(reply_prefix), "template": template or None}
    return tokenizer.apply_chat_template(messages, **options, **variables)


def _print_figures(figures: dict[str, Any], console: Any) -> None:
    for name, value in figures.items():
        console.print(f"{name.replace('_', ' ')}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def _figures(result: Any, pattern: str, network: Any) -> dict[str, Any]:
    stats = result.stats
    known = [info for info in result.info if info is not None]
    figures = {
        "pattern": pattern,
        "dtype": network.dtype.name,
        "fp8_projections": network.fp8_projections,
        "cache": result.cache.k.dtype.name,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
        "compilation_included": stats.compiled,
    }
    if result.info:  # each is None where attention was dense
        figures["density"] = _mean([info.density for info in known]) if known else 1.0
        figures["estimated_recall"] = _mean([info.recall for info in known]) if known else 1.0
    return figures


def _mean(arrays: list[Any]) -> float:
    import jax.numpy as jnp

    return float(jnp.mean(jnp.stack([jnp.mean(array) for array in arrays])))
