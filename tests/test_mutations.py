"""Mutated JSON files of checkpoints: a clear error, or what transformers reads; never anything else.

A seed gives the changes. A share of them runs always, the whole of them nightly, and then through both networks.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write_byte_model
from mutations import GENERATION, SPECIAL, TOKENIZER, applied, config_changes, generation_changes, tokenizer_changes
from torch_env import torch_python
from variants import FAMILIES, VARIANTS

from minference_jax.checkpoints.hf_files import read_hf_config
from minference_jax.compare.torch_process import run_torch_jobs
from minference_jax.models import LlamaConfig
from minference_jax.models.llama import Llama
from minference_jax.text.tokenizer import load_tokenizer

BASES = ("gqa4", "rope_llama3", "mistral_window", "qwen2", "qwen3_window_bias", "phi3_longrope", *FAMILIES)
SHARE, ALL = 150, 2000


def mutated(count: int, seed: int = 0) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(base, change, config) of so many mutations, the bases in turn."""
    numbers, found = random.Random(seed), []
    for i in range(count):
        base = BASES[i % len(BASES)]
        change = config_changes(VARIANTS[base], numbers)
        found.append((base, change, applied(copy.deepcopy(VARIANTS[base]), change)))
    return found


def read(config: dict[str, Any]) -> LlamaConfig | str:
    """Our config, or what the error says. Any other exception is a fault."""
    try:
        return LlamaConfig.from_hf(config)
    except ValueError as error:
        return str(error)


def values(ours: LlamaConfig) -> dict[str, Any]:
    """What both sides must agree about, of ours."""
    rope = ours.rope
    return {
        "sizes": (ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.num_layers, ours.num_heads),
        "heads": (ours.num_kv_heads, ours.head_dim),
        "norm": ours.rms_norm_eps,
        "length": ours.max_position_embeddings,
        "tied": ours.tie_embeddings,
        "rope": (rope.kind, rope.theta, rope.partial_rotary_factor),
        "factor": 1.0 if rope.kind == "default" else rope.factor,
    }


def their_values(config: dict[str, Any]) -> dict[str, Any] | str:
    """The same of transformers' config class, whose checks it must pass but for one, which head_dim makes needless."""
    from huggingface_hub.errors import StrictDataclassClassValidationError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        theirs = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    except StrictDataclassClassValidationError as error:
        if "is not a multiple of the number of attention" in str(error) and config.get("head_dim"):
            return "hidden_size is no multiple of num_attention_heads"
        raise
    heads = theirs.num_attention_heads
    rope = theirs.rope_parameters
    rope = rope.get("full_attention", rope)
    kind = rope["rope_type"]
    factor = rope.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = theirs.max_position_embeddings / rope["original_max_position_embeddings"]
    return {
        "sizes": (theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers, heads),
        "heads": (theirs.num_key_value_heads, getattr(theirs, "head_dim", None) or theirs.hidden_size // heads),
        "norm": theirs.rms_norm_eps,
        "length": theirs.max_position_embeddings,
        "tied": theirs.tie_word_embeddings,
        "rope": (kind, rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)),
        "factor": 1.0 if kind == "default" else factor,
    }


@pytest.mark.parametrize("count", [SHARE, pytest.param(ALL, marks=pytest.mark.nightly)])
def test_a_config_is_refused_in_words_or_read_as_transformers_reads_it(count):
    taken = 0
    for base, change, config in mutated(count):
        ours = read(config)
        if isinstance(ours, str):
            assert ours and "\n" not in ours, (base, change)
            continue
        taken += 1
        if IGNORED.isdisjoint(change):
            theirs = their_values(config)
            assert theirs in (values(ours), "hidden_size is no multiple of num_attention_heads"), (base, change)
    assert count / 4 < taken < count * 3 / 4


# Keys that make no difference to a text model's numbers: transformers refuses some of their values, and we read none.
IGNORED = frozenset(("use_cache", "initializer_range", "attention_dropout", "torch_dtype", "auto_map", "architectures"))


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_a_config_that_is_read_gives_the_logits_of_pytorch(tmp_path):
    """Of each config that differs from its base's in a way that the numbers show, and that the base's weights fit."""
    python, jobs = torch_python(), []
    for seed, base in enumerate(BASES):
        create = {"kind": "create", "model": str(tmp_path / base), "config": VARIANTS[base], "seed": seed}
        jobs.append(create | {"keep_config": True, "max_shard_size": "1GB"})
    run_torch_jobs(jobs, torch_python=python, threads=1, timeout=300)
    tokens = np.random.default_rng(0).integers(3, 331, (1, 150)).astype(np.int32)
    jobs, models, seen = [], [], set()
    for number, (base, change, config) in enumerate(mutated(600)):
        ours = read(config)
        if isinstance(ours, str) or (base, ours) in seen or not IGNORED.isdisjoint(change):
            continue
        seen.add((base, ours))
        path = tmp_path / f"{number}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        (path / "model.safetensors").symlink_to(tmp_path / base / "model.safetensors")
        try:
            model = Llama.from_pretrained(path, dtype="float32")
        except ValueError:  # other shapes than the base's
            continue
        models.append((base, change, path, np.asarray(model(jnp.asarray(tokens))[0])))
        np.save(path / "tokens.npy", tokens)
        np.save(path / "lengths.npy", np.array([150], np.int32))
        run = {"kind": "run", "model": str(path), "output": str(path), "dtype": "float32", "device": "cpu"}
        run |= {"attention": "sdpa", "chunk": 150, "layers": False, "positions": list(range(150)), "new_tokens": 1}
        jobs.append(run)
    run_torch_jobs(jobs, torch_python=python, threads=1, timeout=2400)
    assert len(models) > 30
    for base, change, path, logits in models:
        theirs = np.load(path / "logits.npy")[0]
        np.testing.assert_allclose(logits, theirs, atol=2e-4, err_msg=f"{base} {change}")


TEXTS = ("hello <s>world</s>", " a b<|end|> 12\n\n", "<pad>x<new>y", "äöü 漢字")
MESSAGES = [{"role": "user", "content": "hi"}]


def loaded(load, template) -> dict[str, Any] | str:
    """What a tokenizer does with some texts, or why it does nothing. Ours may fail in words only."""
    words = ValueError if load.__name__ == "ours" else Exception
    try:
        tokenizer, hf = load()
        ids = (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id)
        found: dict[str, Any] = {"ids": ids, "texts": [tokenizer.encode(text) for text in TEXTS]}
        found["decoded"] = tokenizer.decode([5, 6, 7, 3])
    except words as error:
        return str(error) or repr(error)
    with contextlib.suppress(words):
        found["chat"] = template(tokenizer)
    return found


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.nightly)])
def test_a_tokenizer_config_is_refused_in_words_or_does_what_transformers_does(tmp_path, count):
    from transformers import AutoTokenizer

    write_byte_model(tmp_path, SPECIAL)
    numbers, same = random.Random(0), 0

    def ours():
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.digest()
        return tokenizer, tokenizer.hf

    def theirs():
        tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
        return tokenizer, tokenizer

    def our_chat(tokenizer):
        return tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)

    def their_chat(tokenizer):
        return tokenizer.encode(tokenizer.apply_chat_template(MESSAGES, tokenize=False), add_special_tokens=False)

    for _ in range(count):
        change = tokenizer_changes(numbers)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(applied(TOKENIZER, change)))
        ours_found, theirs_found = loaded(ours, our_chat), loaded(theirs, their_chat)
        if isinstance(ours_found, str):
            assert str(tmp_path) in ours_found, change
        elif isinstance(theirs_found, str):
            # Names and limits that are not used here.
            assert change.keys() <= {"tokenizer_class", "model_max_length"}, change
        else:
            same += 1
            chats = ours_found.pop("chat", None), theirs_found.pop("chat", None)
            assert ours_found == theirs_found, change
            assert chats[0] == chats[1] or (chats[0] is None and change == {"chat_template": ""}), change
    assert same > count / 4


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.nightly)])
def test_a_generation_config_is_refused_in_words_or_names_the_same_ends(tmp_path, count):
    from transformers import GenerationConfig

    (tmp_path / "config.json").write_text(json.dumps(VARIANTS["gqa4"]))
    numbers, taken = random.Random(0), 0
    for _ in range(count):
        change = generation_changes(numbers)
        (tmp_path / "generation_config.json").write_text(json.dumps(applied(GENERATION, change)))
        try:
            theirs = GenerationConfig.from_pretrained(tmp_path).eos_token_id
        except (TypeError, ValueError):  # settings of sampling, which are not read here
            continue
        try:
            config = LlamaConfig.from_hf(read_hf_config(tmp_path))
        except ValueError as error:
            assert "generation_config.json: eos_token_id must be" in str(error) and "eos_token_id" in change
            continue
        taken += 1
        theirs = VARIANTS["gqa4"]["eos_token_id"] if theirs is None else theirs
        named = theirs if isinstance(theirs, list) else [theirs]
        assert config.eos_token_ids == tuple(token for token in named if token >= 0), change
    assert taken > count / 2
