"""A document of headings, paragraphs, tables and figures, written as Markdown."""

from pathlib import Path
from typing import NamedTuple

from benchmarks._markdown import table


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
