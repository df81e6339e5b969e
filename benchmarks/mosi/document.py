"""A document of headings, paragraphs, tables and figures, written as Markdown and as one self-contained HTML file."""

import base64
import html
import re
from pathlib import Path
from typing import NamedTuple

from benchmarks._markdown import table

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
thead { border-bottom: 2px solid #888 }
img { max-width: 100% }
figcaption { color: #555; font-size: 0.85rem }
"""


class Heading(NamedTuple):
    text: str
    level: int = 2


class Paragraph(NamedTuple):
    text: str


class Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]


class Image(NamedTuple):
    path: Path
    caption: str


Block = Heading | Paragraph | Table | Image


def markdown(blocks: list[Block]) -> str:
    """Figures are links to the files beside the document."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Table(head, rows):
            head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in (head, *rows))
            return "\n".join(table(head, rows)).rstrip()
        case Image(path, caption):
            return f"![{caption}]({path.name})\n\n*{caption}*"


def page(title: str, blocks: list[Block]) -> str:
    """Figures are part of the file, and nothing is loaded from elsewhere: the policy in its head forbids it."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(map(_html, blocks))
        + "\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Table(head, rows):
            body = "\n".join(_row(row, "td") for row in rows)
            return (
                f"<table>\n<thead>{_row(head, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
            )
        case Image(path, caption):
            data = base64.b64encode(path.read_bytes()).decode()
            alt = html.escape(caption)
            return (
                f'<figure>\n<img alt="{alt}" src="data:image/png;base64,{data}">\n'
                f"<figcaption>{alt}</figcaption>\n</figure>"
            )


def _row(cells: list[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells) + "</tr>"


def _inline(text: str) -> str:
    """Bold and code, the only marks that the report uses."""
    escaped = html.escape(text, quote=False)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escaped))
