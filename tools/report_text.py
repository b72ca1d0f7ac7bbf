"""Small pieces of HTML that all parts of a report are made of: escaped text, numbers, tables."""

from __future__ import annotations

import math
from html import escape
from typing import Any, Sequence

NUM_COLOURS = 8  # of runs, in report.css; the second half is dashed as well
MAX_TEXT = 700  # characters of one answer

_SIGNS = {**{i: chr(0x2400 + i) for i in range(32) if i not in (9, 10)}, 127: "\u2421",
          **{i: "\ufffd" for i in range(0x80, 0xa0)}}


class Html(str):
    """Text that is HTML already; every other text is escaped."""


def text(value: Any) -> str:
    """A value as text that no browser takes for anything else."""
    if isinstance(value, Html):
        return value
    return escape(str(value).encode("utf-8", "replace").decode("utf-8").translate(_SIGNS))


def cut(value: str, limit: int = MAX_TEXT) -> str:
    """The beginning of a long text, and how long it is."""
    return value if len(value) <= limit else f"{value[:limit]}\u2026 ({len(value)} characters)"


def number(value: float | None) -> str:
    """A number with four digits; "-" for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 10_000 else f"{value:.4g}"


def fraction(value: float | None) -> str:
    """A figure between 0 and 1 with three decimals; "-" for one that is not defined."""
    return "-" if value is None else f"{value:.3f}"


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]], words: int = 1) -> str:
    """A table that scrolls sideways where it is too wide; all but the first ``words`` columns hold numbers."""
    def row(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(_cell(cell, tag if i or tag == "th" else "th", i, words)
                                for i, cell in enumerate(cells)) + "</tr>"

    return ('<div class="scroll"><table><thead>' + row(header, "th") + "</thead><tbody>"
            + "".join(row(cells, "td") for cells in rows) + "</tbody></table></div>")


def fold(summary: str, content: str, is_open: bool = False) -> str:
    """Content that is shown on a click; ``content`` is HTML."""
    return f'<details class="fold"{" open" * is_open}><summary>{text(summary)}</summary>{content}</details>'


def _cell(cell: Any, tag: str, column: int, words: int) -> str:
    if isinstance(cell, Html) and cell.startswith("<td"):
        return cell
    kind = "" if column < words else ' class="n"'
    return f"<{tag}{kind}>{text(cell)}</{tag}>"
