"""Draw samples with their boxes and questions on one sheet, so that a person sees whether the boxes are right."""

from __future__ import annotations

from typing import Sequence

from PIL import Image, ImageDraw, ImageFont

from megavg.protocols.sample import Box, Sample

COLOURS = ((0, 158, 96), (230, 97, 0), (26, 104, 222), (190, 30, 110), (120, 80, 200), (0, 150, 170), (170, 120, 0),
           (90, 90, 90))
_HALO, _PAPER, _INK, _FAINT, _FRAME = (255, 255, 255), (255, 255, 255), (33, 37, 41), (108, 117, 125), (206, 212, 218)
_MARGIN = 16
_LINE = 2
_CAPTION_LINES = 3


def contact_sheet(samples: Sequence[Sample], title: str, columns: int = 4, tile_width: int = 420) -> Image.Image:
    """Lay ``samples`` out in a grid: picture, boxes, question, key and size.

    Boxes of a detection are coloured by label, with a legend on top; where the sheet has more labels than colours, the
    label is written on each box instead.

    Args:
        samples: with decoded pictures.
        title: one line above them.
        columns: tiles in a row.
        tile_width: of a tile, in pixels; a picture is fitted into a square of it.

    Raises:
        ValueError: no sample, or no column.
    """
    if not samples or columns < 1:
        raise ValueError(f"expected at least one sample and one column, got {len(samples)} and {columns}")
    columns = min(columns, len(samples))
    names = sorted({label for sample in samples if sample.task == "detection" for label in sample.labels})
    colours = dict(zip(names, COLOURS)) if len(names) <= len(COLOURS) else None
    tiles = [_tile(sample, tile_width, colours) for sample in samples]
    rows = [tiles[start:start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    top = 2 * _MARGIN + (48 if colours else 24)
    sheet = Image.new("RGB", (columns * (tile_width + _MARGIN) + _MARGIN, top + sum(heights) + _MARGIN * len(rows)),
                      _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), _fitted(title, _font(18), sheet.width - 2 * _MARGIN), font=_font(18), fill=_INK)
    x = _MARGIN
    for name, colour in (colours or {}).items():
        pen.rectangle((x, 46, x + 16, 58), outline=colour, width=_LINE)
        pen.text((x + 22, 43), name, font=_font(15), fill=_INK)
        x += 46 + round(_font(15).getlength(name))
    y = top
    for row, height in zip(rows, heights):
        for column, tile in enumerate(row):
            sheet.paste(tile, (_MARGIN + column * (tile_width + _MARGIN), y))
        y += height + _MARGIN
    return sheet


def _tile(sample: Sample, width: int, colours: dict[str, tuple[int, int, int]] | None) -> Image.Image:
    scale = width / max(sample.width, sample.height)
    size = max(1, round(sample.width * scale)), max(1, round(sample.height * scale))
    # Enlarged pixels stay pixels: smoothing hides by how much a box is off.
    picture = sample.image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=_FRAME)
    scaled = [_scaled(box, size, sample) for box in sample.boxes_xyxy_px]
    for box in scaled:
        pen.rectangle(_outside(box, _LINE + 1, size), outline=_HALO, width=_LINE + 1)
    labels = sample.labels if sample.task == "detection" else [""] * len(scaled)
    for box, label in zip(scaled, labels):
        pen.rectangle(_outside(box, _LINE, size), outline=(colours or {}).get(label, COLOURS[0]), width=_LINE)
    for box, label in zip(scaled, labels):
        if label and colours is None:
            _draw_label(pen, box, label, COLOURS[0], size)
    lines = _wrapped(sample.expression, _font(15), width)
    if sample.task == "classification":
        lines += _wrapped("answer: " + ", ".join(sample.labels), _font(15), width)
    tile = Image.new("RGB", (width, size[1] + 28 + 19 * len(lines)), _PAPER)
    tile.paste(picture, ((width - size[0]) // 2, 0))
    pen = ImageDraw.Draw(tile)
    for number, line in enumerate(lines):
        pen.text((0, size[1] + 5 + 19 * number), line, font=_font(15), fill=_INK)
    count = "1 box" if len(scaled) == 1 else f"{len(scaled)} boxes"
    facts = f"{sample.task}, {sample.width} x {sample.height}, {count}, {sample.key}"
    pen.text((0, tile.height - 20), _fitted(facts, _font(12), width), font=_font(12), fill=_FAINT)
    return tile


def _scaled(box: Box, size: tuple[int, int], sample: Sample) -> Box:
    sx, sy = size[0] / sample.width, size[1] / sample.height
    return box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy


def _outside(box: Box, line: int, size: tuple[int, int]) -> tuple[int, ...]:
    """Corners of an outline around the box, so that nothing in a small box is painted over, but in the picture."""
    x0, y0 = round(box[0]), round(box[1])
    x1, y1 = max(round(box[2]), x0 + 1) - 1, max(round(box[3]), y0 + 1) - 1
    return (max(x0 - line, 0), max(y0 - line, 0), min(x1 + line, size[0] - 1), min(y1 + line, size[1] - 1))


def _draw_label(pen: ImageDraw.ImageDraw, box: Box, label: str, colour: tuple[int, int, int],
                size: tuple[int, int]) -> None:
    font = _font(12)
    text = _fitted(label, font, size[0] / 2)
    width = font.getlength(text) + 6
    x = min(max(box[0] - _LINE, 0), size[0] - width)
    y = box[1] - _LINE - 15 if box[1] >= 18 else min(box[3] + _LINE, size[1] - 16)
    pen.rectangle((x, y, x + width, y + 15), fill=colour)
    pen.text((x + 3, y), text, font=font, fill=_HALO)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """One line no wider than ``width`` pixels, with an ellipsis where something was cut off."""
    text = " ".join(text[:400].split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """At most three lines no wider than ``width`` pixels, broken between words."""
    lines = [""]
    words = text[:600].split()
    while words:
        joined = f"{lines[-1]} {words[0]}".strip()
        if not lines[-1] or font.getlength(joined) <= width:
            lines[-1] = joined
            words.pop(0)
        elif len(lines) == _CAPTION_LINES:
            lines[-1] = f"{lines[-1]} {' '.join(words)}"
            break
        else:
            lines.append("")
    return [_fitted(line, font, width) for line in lines]
