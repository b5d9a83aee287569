"""What rows say about some keywords: read in one prefill if they fit, else in parts whose notes are joined.

The program counts: which rows mention a keyword, and how often, is looked up in the texts and never asked of the model.
The model writes the sentences, and names rows in brackets; a row that was not before it is no citation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minference_jax.jobs.output import JobFile
from minference_jax.models.cache import KVCache
from minference_jax.models.config import LlamaConfig
from minference_jax.models.generate import generate
from minference_jax.models.llama import Llama
from minference_jax.runs.identity import content_digest, model_identity
from minference_jax.runs.lock import locked

Progress = Callable[[int, int], None]
"""Called with questions answered and their total, as far as it is known."""

READ = "{text}\n\nWhat do these rows say about {keyword}? Answer in one or two sentences. Name rows like [3]."
JOIN = "{text}\n\nThese are notes about {keyword}. Join them into one or two sentences. Name rows like [3]."
CITED = 3
"""Rows that are cited where the model names none: the first that mention the keyword."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """About one keyword: the `rows` that mention it, how many `mentions` there are in all, what the model made of them
    (empty where no row does), and `citations`, rows of `rows` or others that the model named."""

    keyword: str
    rows: tuple[int, ...]
    mentions: int
    summary: str
    citations: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of `rows` rows, read in `parts` parts; a finding for each keyword, in their order."""

    rows: int
    parts: int
    findings: tuple[Finding, ...]


def summarize(
    model: Llama,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    keywords: Sequence[str],
    *,
    context: int | None = None,
    max_new_tokens: int = 96,
    raw: bool = False,
    out: str | Path | None = None,
    wait: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """What `rows` say about each of `keywords`, with counts and citations. Replies are greedy.

    **Arguments:**

    - `rows`: their field `text`, or all fields where one has none. Keywords are found whatever their case.
    - `context`: tokens of prompt and reply at most, by default the model's context. Rows that do not fit are read in
      parts; a row that is longer than a part goes on in the next one.
    - `raw`: no chat template.
    - `out`: a JSONL file of all replies. Where it exists, what it holds is not asked again, if the same model, rows and
      settings made it. `wait`: where another process works on it, wait until it is done.

    **Raises:** ValueError for no rows, keywords that are empty or not distinct, and a context that holds no text or is
    longer than the model's; `LockedError` where another process works on `out`.
    """
    job = SummaryJob.of(model.config, tokenizer, rows, keywords, context, max_new_tokens=max_new_tokens, raw=raw)
    return job.run(model, tokenizer, out=out, wait=wait, progress=progress)


@dataclasses.dataclass(frozen=True)
class SummaryJob:
    """What `summarize` is asked to do, checked, which takes no weights: `of` raises what is wrong with it.

    - `texts`: of each row. `parts`: the texts as they are read, `room` tokens at most.
    """

    texts: tuple[str, ...]
    keywords: tuple[str, ...]
    parts: tuple[_Part, ...]
    room: int
    context: int
    max_new_tokens: int
    raw: bool

    @classmethod
    def of(
        cls,
        config: LlamaConfig,
        tokenizer: Any,
        rows: Sequence[Mapping[str, Any]],
        keywords: Sequence[str],
        context: int | None = None,
        *,
        max_new_tokens: int = 96,
        raw: bool = False,
    ) -> SummaryJob:
        """The job of these rows, for a model of this config. Arguments and errors are those of `summarize`."""
        if not rows:
            raise ValueError("rows: there must be at least one")
        names = tuple(keyword.strip() for keyword in keywords)
        if not names or not all(names) or len({name.casefold() for name in names}) < len(names):
            raise ValueError(f"keywords must be one or more that differ, got {list(keywords)}")
        context = context or config.context_length
        if context is None:
            raise ValueError("context must be given: the model does not say how long its own is")
        if context > (config.context_length or context):
            raise ValueError(f"context {context} is longer than the model's, {config.context_length}")
        room = context - max_new_tokens - max(len(_question(tokenizer, raw, READ, "", name)) for name in names)
        if max_new_tokens < 1 or room < 16:
            raise ValueError(
                f"context {context} has no room for text beside a question and {max_new_tokens} new tokens"
            )
        texts = tuple(map(_text, rows))
        return cls(texts, names, tuple(_parts(tokenizer, texts, room)), room, context, max_new_tokens, raw)

    def settings(self) -> dict[str, Any]:
        """What decides the replies beside the model, for `output.check_job_file`."""
        return {
            "context": self.context,
            "max_new_tokens": self.max_new_tokens,
            "raw": self.raw,
            "keywords": list(self.keywords),
            "texts": content_digest(list(self.texts)),
        }

    def run(
        self,
        model: Llama,
        tokenizer: Any,
        *,
        out: str | Path | None = None,
        wait: bool = False,
        progress: Progress | None = None,
    ) -> Summary:
        """The summary. Arguments and errors are those of `summarize`."""
        ask = _Asker(model, tokenizer, self.max_new_tokens, self.raw, progress)
        names, folded = self.keywords, [text.casefold() for text in self.texts]
        mentioned = {name: [row for row, text in enumerate(folded) if name.casefold() in text] for name in names}
        # Questions about one part follow each other, so that its text is processed once.
        asked = [(part, name) for part in self.parts for name in names if not part.rows.isdisjoint(mentioned[name])]
        notes: dict[str, list[str]] = {name: [] for name in names}
        cited: dict[str, list[int]] = {name: [] for name in names}
        with contextlib.ExitStack() as stack:
            if out is not None:
                stack.enter_context(locked(out, wait=wait))
                model_is = {"model": content_digest((model.config, model.patterns, model.auto))}
                ask.file = JobFile(out, model_identity(model, tokenizer) | self.settings() | model_is)
            ask.total = len(asked)
            if progress is not None and ask.file is not None and ask.file.rows:
                progress(len(ask.file.rows), max(len(asked), len(ask.file.rows)))
            for part, name in asked:
                reply = ask(READ, part.text, name)
                found = [int(row) for row in re.findall(r"\[(\d{1,9})\]", reply) if int(row) in part.rows]
                cited[name] += found or [row for row in mentioned[name] if row in part.rows][:CITED]
                notes[name].append(reply)
            summaries = {name: _joined(ask, tokenizer, notes[name], name, self.room) for name in names}
        findings = (
            Finding(
                name,
                tuple(mentioned[name]),
                sum(text.count(name.casefold()) for text in folded),
                summaries[name],
                tuple(dict.fromkeys(cited[name])),
            )
            for name in names
        )
        return Summary(len(self.texts), len(self.parts), tuple(findings))


@dataclasses.dataclass(frozen=True)
class _Part:
    text: str
    rows: frozenset[int]


def _text(row: Mapping[str, Any]) -> str:
    text = row["text"] if isinstance(row.get("text"), str) else ", ".join(f"{k}: {v}" for k, v in row.items())
    return " ".join(text.split())


def _parts(tokenizer: Any, texts: Sequence[str], room: int) -> list[_Part]:
    """Rows with their numbers in brackets, as many in a part as fit in `room` tokens."""
    parts: list[_Part] = []
    lines: list[str] = []
    rows: set[int] = set()
    used = 0

    def end() -> None:
        nonlocal lines, rows, used
        if lines:
            parts.append(_Part("\n".join(lines), frozenset(rows)))
        lines, rows, used = [], set(), 0

    for row, text in enumerate(texts):
        for piece in _pieces(tokenizer, f"[{row}] ", text, room):
            size = len(tokenizer.encode(piece + "\n", add_special_tokens=False))
            if used + size > room:
                end()
            lines.append(piece)
            rows.add(row)
            used += size
    end()
    return parts


def _pieces(tokenizer: Any, label: str, text: str, room: int) -> list[str]:
    """The text behind its label, cut between words where it is longer than `room` tokens."""
    words, pieces = text.split(" "), []
    while words:
        count = min(len(words), room)  # a word has a token at least, and a text may have millions
        while count > 1 and len(tokenizer.encode(label + " ".join(words[:count]) + "\n")) > room:
            count = -(-count // 2)
        pieces.append(label + " ".join(words[:count]))
        words = words[count:]
    return pieces


def _joined(ask: _Asker, tokenizer: Any, notes: list[str], keyword: str, room: int) -> str:
    """One note of several: as many as fit are joined, until there is one."""
    while len(notes) > 1:
        groups, used = [[notes[0]]], len(tokenizer.encode(notes[0] + "\n"))
        for note in notes[1:]:
            size = len(tokenizer.encode(note + "\n"))
            if used + size > room and len(groups[-1]) > 1:
                groups.append([])
                used = 0
            groups[-1].append(note)
            used += size
        ask.total += len(groups)
        notes = [ask(JOIN, "\n".join(group), keyword) if len(group) > 1 else group[0] for group in groups]
    return notes[0].strip() if notes else ""


def _question(tokenizer: Any, raw: bool, template: str, text: str, keyword: str) -> list[int]:
    """Token ids of a question."""
    words = template.replace("{keyword}", keyword).replace("{text}", text)
    return tokenizer.encode(words) if raw else tokenizer.apply_chat_template([{"role": "user", "content": words}])


class _Asker:
    """Asks the model one question after another; the cache of one is where the next one's beginning is looked for."""

    def __init__(self, model: Llama, tokenizer: Any, max_new_tokens: int, raw: bool, progress: Progress | None):
        self._model, self._tokenizer, self._raw, self._progress = model, tokenizer, raw, progress
        self._max_new_tokens = max_new_tokens
        self._cache: KVCache | None = None
        self._text = ""
        self.file: JobFile | None = None
        self.done = self.total = 0

    def __call__(self, template: str, text: str, keyword: str) -> str:
        """The reply, from the file if it is there."""
        number, self.done = self.done, self.done + 1
        if self._progress is not None:
            self._progress(number, self.total)
        if self.file is not None and number in self.file.rows:
            return self.file.rows[number]["reply"]
        if text != self._text:  # nothing but the template would be shared
            self._cache, self._text = None, text
        ends = self._tokenizer.eos_token_ids
        ids = _question(self._tokenizer, self._raw, template, text, keyword)
        options = {"max_new_tokens": self._max_new_tokens, "eos_token_ids": ends, "cache": self._cache}
        answer = generate(self._model, [ids], **options)
        self._cache = answer.cache
        reply = self._tokenizer.decode(answer.sequences()[0], skip_special_tokens=True)
        if self.file is not None:
            self.file.append([{"row": number, "keyword": keyword, "reply": reply}])
        return reply
