"""Names such as "org/name": models in the local cache of the Hugging Face hub. Nothing is downloaded unless asked."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from minference_jax.extras import naming_extra

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")

FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
"""What a download fetches: weights without pickles, configs and tokenizers."""


def local_checkpoint(path: str | os.PathLike, *, download: bool = False) -> Path:
    """`path` itself where it exists; else the hub's snapshot of a model called "org/name" or "org/name@revision".

    Looks in the hub's cache on this machine (HF_HOME or HF_HUB_CACHE move it). `download`: fetch what is missing there.

    Raises `ValueError` where the name is no path and not in the cache, and says how to get it; `RuntimeError` where a
    download fails.
    """
    text = os.fspath(path)
    found = Path(text)
    if found.exists():
        return found
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text} does not exist")
    name, _, revision = text.partition("@")
    with naming_extra("a model by name"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        options: dict[str, Any] = {"allow_patterns": list(FILES)} if download else {"local_files_only": True}
        return Path(snapshot_download(name, revision=revision or None, **options))
    except LocalEntryNotFoundError as error:
        if download:
            raise RuntimeError(f"{text} could not be downloaded: {error}") from None
        raise ValueError(
            f"{text} does not exist, nor is a model of this name in the hub's cache. Nothing is downloaded unless "
            f"asked: `hf download {name}`, or Llama.from_pretrained(…, download=True)"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise RuntimeError(f"{text} could not be downloaded: {error}") from None
