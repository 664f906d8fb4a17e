"""A small document that is written as Markdown and as one offline HTML page; all text is escaped."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left; } img { max-width: 100%; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table; the first row is its head."""

    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    path: Path
    caption: str


Block = Heading | Text | Grid | Image


def markdown(blocks: Sequence[Block]) -> str:
    """Images are named by their file name, which lies beside the text."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Text():
            return block.text
        case Grid():
            rows = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
            lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
            return "\n".join(f"| {' | '.join(row)} |" for row in lines)
        case Image():
            return f"![{block.caption}]({block.path.name})"


def html(title: str, blocks: Sequence[Block]) -> str:
    """Images are embedded, so that the page can be mailed."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(_html(block) for block in blocks)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
        case Text():
            return f"<p>{escape(block.text)}</p>"
        case Grid():
            head, *rows = block.rows
            lines = [_row(head, "th"), *(_row(row, "td") for row in rows)]
            return f"<table>{''.join(lines)}</table>"
        case Image():
            data = base64.b64encode(block.path.read_bytes()).decode()
            return (
                f'<img alt="{escape(block.caption)}" src="data:image/png;base64,{data}"><p>{escape(block.caption)}</p>'
            )


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
