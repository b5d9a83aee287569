"""The checkpoint's own tokenizer: text ↔ ids, chat prompts, and text that streams without half characters."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minference_jax.checkpoints.gguf_config import eos_token_ids
from minference_jax.checkpoints.gguf_split import open_gguf
from minference_jax.checkpoints.hf_files import find_gguf, read_hf_config
from minference_jax.checkpoints.hub import local_checkpoint
from minference_jax.extras import naming_extra
from minference_jax.models.hf_config import text_config
from minference_jax.text.gguf_tokenizer import build_tokenizer, tokenizer_config

_UNKNOWN_CHARACTER = "\ufffd"  # what decoders print for bytes that are not (yet) UTF-8
_NO_LIMIT = 10**30  # transformers' own value for it; a limit would only print warnings


class Tokenizer:
    """Text ↔ token ids, over the tokenizer that transformers loads for the checkpoint (`hf`).

    `eos_token_ids` holds every id at which generation should stop: the tokenizer's, the config's, the generation
    config's.
    """

    def __init__(self, hf: Any, eos_token_ids: Iterable[int] = ()):
        self.hf = hf
        own = () if hf.eos_token_id is None else (hf.eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys((*eos_token_ids, *own)))

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, the added ones included."""
        return len(self.hf)

    @property
    def pad_token_id(self) -> int:
        """The padding id; padding is never read, so any id serves where the checkpoint names none."""
        return self.hf.pad_token_id if self.hf.pad_token_id is not None else 0

    def digest(self) -> str:
        """A hash of what it does: vocabulary, merges, special tokens, chat template, end-of-text ids."""
        backend = getattr(self.hf, "backend_tokenizer", None)
        rules = self.hf.get_vocab() if backend is None else json.loads(backend.to_str())
        special = {name: str(token) for name, token in self.hf.special_tokens_map.items()}
        parts = [rules, special, self.hf.chat_template, self.eos_token_ids]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Special tokens written in it are recognized; `add_special_tokens` puts a bos first if the
        checkpoint does so."""
        return self.hf.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.hf.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Ids of a conversation, as the checkpoint's own template writes it.

        **Arguments:**

        - `messages`: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first. A content that is a
          list of `{"type": "text", "text": …}` is the texts one after another.
        - `add_generation_prompt`: ends with the opening of the assistant's turn.
        - `continue_final_message`: leaves the last message open, so that the model goes on writing it; the generation
          prompt is left out then.
        - `template`: the name of a template, where the checkpoint has several ("default", "tool_use", "rag").
        - `variables`: whatever the template reads: `enable_thinking=False`, `tools=[…]`, `documents=[…]`, a date.

        Raises `ValueError` when the checkpoint has no such template, or the template refuses the messages.
        """
        name = self._template_name(template, variables)
        plain = [{**message, "content": _plain_content(message.get("content"))} for message in messages]
        try:
            text = self.hf.apply_chat_template(
                plain,
                chat_template=name,
                tokenize=False,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **variables,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, add_special_tokens=False)  # the template has written them already

    def check_chat_template(self, template: str | None = None) -> None:
        """Raises `ValueError` when the checkpoint has no chat template (of that name)."""
        self._template_name(template, {})

    def _template_name(self, template: str | None, variables: Mapping[str, Any]) -> str | None:
        """What selects the template: None for the only one."""
        known = self.hf.chat_template
        if not known:
            raise ValueError("this checkpoint has no chat template: encode the prompt as plain text (commands: --raw)")
        if not isinstance(known, dict):
            if template not in (None, "default"):
                raise ValueError(f"this checkpoint has one chat template, and none of the name {template!r}")
            return None
        if template is None:
            template = "tool_use" if variables.get("tools") and "tool_use" in known else "default"
        if template not in known:
            raise ValueError(f"this checkpoint has no chat template {template!r}; there are {', '.join(known)}")
        return template

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)


def _plain_content(content: Any) -> Any:
    """A message's content as text, where it is a list of texts."""
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"messages may hold text only, got a content of type {kind!r}")
    return "".join(texts)


class StreamDecoder:
    """Turns ids into text as they come. A character split over several tokens is held back until it is whole."""

    _LONGEST, _KEPT = 64, 8  # ids decoded again at every step, and what is kept of them as context

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._sent = 0  # characters of the decoded ids that were given out

    def push(self, token: int) -> str:
        """The text that became certain with this id; may be empty."""
        self._ids.append(int(token))
        text = self._decode(self._ids)
        whole = text.rstrip(_UNKNOWN_CHARACTER)
        new = whole[self._sent :]
        self._sent = max(self._sent, len(whole))
        if len(self._ids) >= self._LONGEST and whole == text:
            context = self._decode(self._ids[-self._KEPT :])
            if _UNKNOWN_CHARACTER not in context:  # else the cut would be inside a character
                self._ids, self._sent = self._ids[-self._KEPT :], len(context)
        return new

    def end(self) -> str:
        """What was held back, with U+FFFD for an unfinished character. Resets the decoder."""
        rest = self._decode(self._ids)[self._sent :]
        self._ids, self._sent = [], 0
        return rest

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint: a Hugging Face directory, a .gguf file, a directory with one, or a
    name in the local cache of the Hugging Face hub.

    A tokenizer.json is used as it is: transformers' classes for some models would replace its rules by their own.
    Never uses the network and never runs code from the checkpoint. Raises `ValueError` naming the path when there is
    no tokenizer or it cannot be read.
    """
    path = local_checkpoint(path)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install PyTorch
    if gguf := find_gguf(path):
        return _from_gguf(gguf)
    if not path.is_dir():
        raise ValueError(f"{path}: neither a GGUF file nor a checkpoint directory")
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"{path} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    config = text_config(read_hf_config(path)) if (path / "config.json").is_file() else {}
    eos = config.get("eos_token_id")
    whole = (path / "tokenizer.json").is_file()
    only_model = not whole and (path / "tokenizer.model").is_file() and not (path / "vocab.json").is_file()
    if only_model and importlib.util.find_spec("sentencepiece") is None:
        raise ValueError(
            f"{path} has tokenizer.model and no tokenizer.json: reading it needs the 'sentencepiece' package "
            "(pip install sentencepiece protobuf), or save the tokenizer again with transformers"
        )

    with naming_extra("a tokenizer"):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind: Any = PreTrainedTokenizerFast if whole else AutoTokenizer
    try:
        hf = kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise everything from OSError to bare Exception here
        raise ValueError(f"{path}: the tokenizer cannot be loaded: {error}") from error
    hf.model_max_length = _NO_LIMIT
    return Tokenizer(hf, [x for x in (eos if isinstance(eos, list) else [eos]) if type(x) is int and x >= 0])


def _from_gguf(path: Path) -> Tokenizer:
    with naming_extra("a tokenizer"):
        from transformers import PreTrainedTokenizerFast

    metadata = open_gguf(path).metadata
    try:
        settings = tokenizer_config(metadata) | {"model_max_length": _NO_LIMIT}
        del settings["tokenizer_class"]
        hf = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(metadata), **settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Tokenizer(hf, eos_token_ids(metadata))
