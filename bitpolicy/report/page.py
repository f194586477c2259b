"""The page: plain HTML with its style and pictures inside. It loads nothing, and its security policy forbids it to.

It is dark for readers who prefer that; the pictures keep their white ground.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bitpolicy.report.drawing import Picture

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #222; --faint: #555; --rule: #ddd; --hair: #eee;
        --link: #0a58a5; --code: #f4f4f4; --mark: #332288; --lack: #DDCC77; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #17191c; --ink: #e4e4e4; --faint: #a9adb3; --rule: #3c4046; --hair: #2b2e33;
          --link: #7db8f5; --code: #26292e; --mark: #a99bf0; --lack: #DDCC77; }
}
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
p.verdict { border-left: 4px solid var(--mark); padding: .1rem 0 .1rem .75rem; }
p.missing { border-left: 4px solid var(--lack); padding: .1rem 0 .1rem .75rem; color: var(--faint); }
nav { font-size: .9rem; margin: .75rem 0 0; }
nav a { margin-right: .9rem; white-space: nowrap; }
a { color: var(--link); }
code { font: .875em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--code);
       padding: .05em .3em; }
figure { margin: 1rem 0 1.25rem; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { font-size: .875rem; color: var(--faint); max-width: 46rem; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; }
th, td { padding: .22rem .7rem .22rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--hair); }
thead th { border-bottom: 1px solid var(--faint); vertical-align: bottom; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--link); font-size: .9rem; }
@media print { body { max-width: none; } details > * { display: block; } }
""".strip()


@dataclass(frozen=True)
class Section:
    """A heading, the HTML below it, and the pictures in that HTML."""

    anchor: str
    title: str
    body: str
    pictures: tuple[Picture, ...] = ()


def page(title: str, lead: str, sections: Sequence[Section], style: str = "", script: str = "") -> str:
    """The whole document.

    Args:
        lead: plain text.
        style, script: CSS in addition to the page's own, and JavaScript that runs at the end.
    """
    links = "\n".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    parts = [f'<section id="{s.anchor}">\n<h2>{escape(s.title)}</h2>\n{s.body}\n</section>' for s in sections]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<style>\n{_STYLE}\n{style}\n</style></head>",
            f"<body>\n<h1>{escape(title)}</h1>",
            paragraph(lead),
            f"<nav>{links}</nav>",
            *parts,
            *([f"<script>\n{script}\n</script>"] if script else []),
            "</body></html>\n",
        ]
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text. Text between backticks becomes code."""
    pieces = escape(text, quote=False).split("`")
    marked = "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
    return f'<p class="{kind}">{marked}</p>' if kind else f"<p>{marked}</p>"


def missing(what: str, command: str) -> str:
    """A section's body if its input is missing."""
    return paragraph(f"{what} Run `{command}`, then make this report again.", "missing")


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table. A column is right-aligned if it contains only numbers (strings that begin with one) and empty cells."""
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    head = "".join(f"<th{_cell(numeric[i], i)}>{escape(name)}</th>" for i, name in enumerate(columns))
    body = "\n".join(
        "<tr>" + "".join(f"<td{_cell(numeric[i], i)}>{escape(str(v))}</td>" for i, v in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _is_number(value: object) -> bool:
    text = str(value).lstrip("-+<>∞")
    return not text or text[0].isdigit()


def _cell(number: bool, column: int) -> str:
    return ' class="n"' if number else ' class="name"' if column == 0 else ""


def folded(summary: str, body: str) -> str:
    """Content that is shown on request; works without scripts."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def figure(picture: Picture, caption: str) -> str:
    """The picture inline, as wide as it was drawn unless the page is narrower."""
    data = base64.b64encode(picture.png).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">'
    return f"<figure>\n{image}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"
