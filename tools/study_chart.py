"""Draw line charts as SVG by hand: rows of quantities, columns of conditions, one legend for all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

# dark enough on white; neighbours differ in lightness as well as in hue, and dashes tell what colours do not
COLOURS = ("#1f2933", "#c2410c", "#1d6fb8", "#15803d", "#9333ea", "#0891b2", "#be185d", "#a16207", "#4d7c0f", "#64748b")
DASHES = ("", "7 3", "2 3", "9 3 2 3")
PANEL, GAP, LEFT, TOP = (300, 190), (62, 66), 62, 74  # pixels: width and height; across and down; margins
_LINE = 20


@dataclass
class Panel:
    """One pair of axes: ``lines`` maps a name to points (x, y), drawn in this order."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def chart(title: str, rows: list[list[Panel]], names: list[str]) -> str:
    """An SVG picture of a grid of panels; a row shares its vertical axis.

    Args:
        names: every line's name, in the order of the legend; a name has one colour and dash in all panels.
    """
    columns = max(len(row) for row in rows)
    per_row = max(1, (columns * (PANEL[0] + GAP[0])) // 190)
    legend = math.ceil(len(names) / per_row) * _LINE
    width = LEFT + columns * PANEL[0] + (columns - 1) * GAP[0] + 20
    height = TOP + legend + len(rows) * PANEL[1] + (len(rows) - 1) * GAP[1] + 56
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12" fill="#1f2933">',
             f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
             f'<text x="{LEFT}" y="28" font-size="16" font-weight="600">{escape(title)}</text>']
    for i, name in enumerate(names):
        x, y = LEFT + i % per_row * 190, 50 + i // per_row * _LINE
        parts += [f'<line x1="{x}" y1="{y - 4}" x2="{x + 26}" y2="{y - 4}" {_pen(i)}/>',
                  f'<text x="{x + 32}" y="{y}">{escape(name)}</text>']
    for r, row in enumerate(rows):
        low, high = _range([y for panel in row for line in panel.lines.values() for _, y in line])
        for c, panel in enumerate(row):
            x, y = LEFT + c * (PANEL[0] + GAP[0]), TOP + legend + r * (PANEL[1] + GAP[1])
            parts += _panel(panel, x, y, low, high, names)
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, left: float, top: float, low: float, high: float, names: list[str]) -> list[str]:
    width, height = PANEL
    xs = [x for line in panel.lines.values() for x, _ in line] or [0.0, 1.0]
    first, last = min(xs), max(max(xs), min(xs) + 1e-9)
    parts = [f'<text x="{left}" y="{top - 8}" font-weight="600">{escape(panel.title)}</text>',
             f'<text x="{left + width / 2}" y="{top + height + 32}" text-anchor="middle">'
             f'{escape(panel.x_label)}</text>',
             f'<text transform="translate({left - 42} {top + height / 2}) rotate(-90)" text-anchor="middle">'
             f'{escape(panel.y_label)}</text>']

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - first) / (last - first) * width, top + height - (y - low) / (high - low) * height

    for value in ticks(low, high):
        y = place(first, value)[1]
        parts += [f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="#e2e8f0"/>',
                  f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="11">{value:g}</text>']
    for value in ticks(first, last):
        x = place(value, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle" font-size="11">{value:g}</text>')
    for name, line in panel.lines.items():
        points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        parts.append(f'<polyline points="{points}" {_pen(names.index(name))}><title>{escape(name)}</title></polyline>')
    parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#94a3b8"/>')
    return parts


def _pen(index: int) -> str:
    dash = DASHES[index // len(COLOURS) % len(DASHES)] or DASHES[index % 2 * (index % 4 == 3)]
    return (f'stroke="{COLOURS[index % len(COLOURS)]}" stroke-width="{2.4 if index == 0 else 1.7}" fill="none"'
            + (f' stroke-dasharray="{dash}"' if dash else ""))


def _range(values: list[float]) -> tuple[float, float]:
    """Limits of an axis a little wider than the values."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
    return low - room, high + room


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside [low, high], about so many."""
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.7)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
