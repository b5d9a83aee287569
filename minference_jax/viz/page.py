"""One HTML page that needs nothing else: text, tables, pictures as SVG, replies side by side. For wide and narrow
screens, and for print."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from minference_jax.extras import naming_extra

STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#1c1c1c;background:#fff;margin:0 auto;padding:1.5rem;max-width:75rem}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .5rem}h2{font-size:1.25rem;margin:2.2rem 0 .6rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}p{max-width:50rem}
.scroll{overflow-x:auto;margin:.4rem 0 1rem}table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.25rem .7rem;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left;white-space:normal;min-width:6rem}
th{border-bottom:2px solid #888}tr:nth-child(even) td{background:#f4f4f4}
.pictures{display:flex;flex-wrap:wrap;gap:1rem}.pictures figure{flex:1 1 22rem;min-width:0;margin:0;max-width:36rem}
figure{margin:.6rem 0}svg{width:100%;height:auto;display:block}summary{cursor:pointer}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;font-size:.9rem;margin:.4rem 0}
dt{color:#555}dd{margin:0;overflow-wrap:anywhere}
.replies{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:.6rem;margin:0 0 1.2rem}
.replies>div{border:1px solid #ccc;border-radius:.3rem;padding:.4rem .6rem;font-size:.9rem;overflow-wrap:anywhere}
.replies b{display:block;font-size:.8rem;color:#555;font-weight:600}.replies div div{white-space:pre-wrap}
mark{background:#ffe08a;color:inherit}.right{border-color:#0072b2}
@media(max-width:40rem){body{padding:.8rem}dl{grid-template-columns:1fr}dd{margin:0 0 .4rem}}
"""

NO_PICTURES = "no pictures: matplotlib is not installed (pip install 'minference-jax[plots]')"
"""What is said where there are none."""


class Page:
    """A page in the making; each method adds to its end."""

    def __init__(self, title: str):
        self._title, self._parts = title, [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        """A heading."""
        self._parts.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Names and values; empty ones are left out."""
        rows = (
            f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>"
            for name, value in facts.items()
            if value not in (None, "", (), [], {})
        )
        self._parts.append(f"<dl>{''.join(rows)}</dl>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, folded: str = "") -> None:
        """A table, which scrolls by itself where it is wider than the page. `folded`: shown when this is clicked."""
        head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
        table = f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"
        if folded:
            table = f"<details><summary>{html.escape(folded)}</summary>{table}</details>"
        self._parts.append(table)

    def pictures(self, pictures: Sequence[str]) -> None:
        """SVG elements, beside each other where there is room."""
        inside = "".join(f"<figure>{svg}</figure>" for svg in pictures)
        self._parts.append(f"<div class='pictures'>{inside}</div>")

    def replies(self, replies: Mapping[str, str], right: str = "") -> None:
        """Texts by who wrote them, side by side, with the right answer. Where one parts from the first is marked."""
        first = next(iter(replies.values()), "")
        boxes = [
            f"<div><b>{html.escape(name)}</b><div>{_marked(text, first if number else text)}</div></div>"
            for number, (name, text) in enumerate(replies.items())
        ]
        if right:
            boxes.append(f"<div class='right'><b>right answer</b><div>{html.escape(right)}</div></div>")
        self._parts.append(f"<div class='replies'>{''.join(boxes)}</div>")

    def html(self) -> str:
        """The whole page."""
        head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width,initial-scale=1'>"
        title = html.escape(self._title)
        body = "\n".join(self._parts)
        head += f"<title>{title}</title><style>{STYLE}</style>"
        return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def parting(text: str, other: str) -> int:
    """Where two texts part: the place of the word in which they first differ; the text's length if it begins the
    other, or is it."""
    if text == other:
        return len(text)
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    if same == len(text):
        return same
    return text.rfind(" ", 0, same) + 1 if same < len(other) else same


def _marked(text: str, first: str) -> str:
    place = parting(text, first)
    rest = f"<mark>{html.escape(text[place:])}</mark>" if place < len(text) else ""
    cut = "<mark>∎</mark>" if not rest and len(text) < len(first) else ""
    return html.escape(text[:place]) + rest + cut


def to_svg(figure: Any) -> str:
    """A matplotlib figure as an SVG element, the same for the same figure. Its text is text."""
    with naming_extra("a picture"):
        from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "minference", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
