"""Draw true and predicted boxes and points on pictures, and lay them out as one panel for a report or the training log.
"""

from __future__ import annotations

from typing import Sequence

from PIL import Image, ImageDraw, ImageFont

from megavg.evaluation.rows import grounding_iou
from megavg.ops.boxes import clip, is_degenerate
from megavg.protocols.sample import Box

TRUE_COLOR = (0, 170, 80)
PREDICTED_COLOR = (255, 95, 0)
_HALO = (255, 255, 255)
_INK = (33, 37, 41)
_FAINT = (108, 117, 125)
_PAPER = (255, 255, 255)
_FRAME = (206, 212, 218)
_MARGIN = 14
_LINE_WIDTH = 3
_DASH = 9
_POINT_RADIUS = 6


def draw_boxes(
    image: Image.Image,
    truth: Sequence[Box],
    predicted: Sequence[Box],
    caption: str,
    scale_to: int = 224,
    points: Sequence[tuple[float, float]] = (),
    verdict: str = "",
    max_lines: int = 3,
) -> Image.Image:
    """Draw one answer as a tile: the picture, true boxes solid green, predicted ones dashed orange, verdict, caption.

    Args:
        image: any mode, at its original size; it is not changed.
        truth: true boxes in original pixels.
        predicted: predicted boxes in original pixels; parts outside the picture are cut off.
        caption: what was asked, wrapped to the tile and cut after ``max_lines``; a line end begins a new line.
        scale_to: the longer side of the picture in the tile and the tile's width, in pixels; small pictures are
            enlarged, large ones reduced.
        points: predicted points in original pixels, drawn as orange rings; those outside are not seen.
        verdict: the line in bold; by default the IoU, or that there is no box.

    Returns:
        An RGB image, ``scale_to`` wide, its height depending on the picture and the caption.
    """
    scale = scale_to / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    # Enlarged pixels stay pixels: a smoothed 96-pixel picture hides by how much a box is off.
    picture = image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=_FRAME)
    scaled_truth = [_scaled(box, size, image.size) for box in truth]
    scaled_predicted = [_scaled(box, size, image.size) for box in predicted]
    # All light lines first: where a predicted side lies on a true one, green shows through its gaps.
    for box in filter(None, scaled_truth + scaled_predicted):
        _draw_halo(pen, box)
    for boxes, color, dash in ((scaled_truth, TRUE_COLOR, 0), (scaled_predicted, PREDICTED_COLOR, _DASH)):
        for box in filter(None, boxes):
            _draw_outline(pen, box, color, dash)
    for x, y in points:
        _draw_point(pen, x * size[0] / image.width, y * size[1] / image.height)

    font, bold = _font(14), _font(15)
    lines = [line for part in caption.split("\n") for line in _wrap(part, font, scale_to, max_lines)][:max_lines]
    tile = Image.new("RGB", (scale_to, size[1] + 26 + 18 * len(lines)), _PAPER)
    tile.paste(picture, ((scale_to - size[0]) // 2, 0))
    pen = ImageDraw.Draw(tile)
    pen.text((0, size[1] + 5), verdict or _verdict(truth, predicted, scaled_predicted), font=bold, fill=_INK)
    for index, line in enumerate(lines):
        pen.text((0, size[1] + 25 + 18 * index), line, font=font, fill=_FAINT)
    return tile


def panel(tiles: Sequence[Image.Image], columns: int, title: str) -> Image.Image:
    """Lay tiles out in a grid under a title and a legend that says which colour is what.

    Args:
        tiles: images such as :func:`draw_boxes` gives; each cell is as large as the largest.
        columns: tiles per row, at least 1; fewer tiles make a narrower panel.
        title: wrapped to the panel's width.

    Raises:
        ValueError: no tile, or no column.
    """
    if not tiles or columns < 1:
        raise ValueError(f"expected at least one tile and one column, got {len(tiles)} tiles in {columns} columns")
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    cell = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    legend = (("true box", TRUE_COLOR, 0), ("predicted box", PREDICTED_COLOR, _DASH))
    font, bold = _font(15), _font(20)
    legend_width = round(sum(font.getlength(name) + 62 for name, _, _ in legend)) - 20
    width = max(columns * (cell[0] + _MARGIN) - _MARGIN, legend_width) + 2 * _MARGIN
    lines = _wrap(title, bold, width - 2 * _MARGIN)
    top = 2 * _MARGIN + 26 * len(lines) + 32
    sheet = Image.new("RGB", (width, top + rows * (cell[1] + _MARGIN)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + 26 * index), line, font=bold, fill=_INK)
    _draw_legend(pen, legend, (_MARGIN, _MARGIN + 26 * len(lines) + 8), font)
    pen.line((_MARGIN, top - _MARGIN, width - _MARGIN, top - _MARGIN), fill=_FRAME)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        sheet.paste(tile, (_MARGIN + column * (cell[0] + _MARGIN), top + row * (cell[1] + _MARGIN)))
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _scaled(box: Box, size: tuple[int, int], original: tuple[int, int]) -> Box | None:
    """The box in the tile's pixels, cut to the picture; None when nothing of it can be seen."""
    x0, y0, x1, y1 = clip(box, *original)
    if is_degenerate(box) or is_degenerate((x0, y0, x1, y1)):
        return None
    sx, sy = size[0] / original[0], size[1] / original[1]
    return x0 * sx, y0 * sy, x1 * sx, y1 * sy


def _draw_halo(pen: ImageDraw.ImageDraw, box: Box) -> None:
    """Draw the light line under an outline, so that it stands out from pictures of any colour."""
    x0, y0, x1, y1 = box[0], box[1], max(box[2] - 1, box[0]), max(box[3] - 1, box[1])
    pen.rectangle((x0 - 2, y0 - 2, x1 + 2, y1 + 2), outline=_HALO, width=_LINE_WIDTH + 2)


def _draw_outline(pen: ImageDraw.ImageDraw, box: Box, color: tuple[int, int, int], dash: int) -> None:
    x0, y0, x1, y1 = box[0], box[1], max(box[2] - 1, box[0]), max(box[3] - 1, box[1])
    for start, end in (((x0, y0), (x1, y0)), ((x1, y0), (x1, y1)), ((x1, y1), (x0, y1)), ((x0, y1), (x0, y0))):
        for piece in _dashes(start, end, dash):
            pen.line(piece, fill=color, width=_LINE_WIDTH)


def _draw_point(pen: ImageDraw.ImageDraw, x: float, y: float) -> None:
    """A ring around a point of the tile, on a light one."""
    for radius, color, width in ((_POINT_RADIUS + 1, _HALO, _LINE_WIDTH + 2), (_POINT_RADIUS, PREDICTED_COLOR,
                                                                               _LINE_WIDTH)):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=width)
    pen.ellipse((x - 1, y - 1, x + 1, y + 1), fill=PREDICTED_COLOR)


def _dashes(start: tuple[float, float], end: tuple[float, float], dash: int) -> list[tuple[float, ...]]:
    """Cut a line into dashes of ``dash`` pixels with gaps of two thirds of that; 0 keeps it whole."""
    length = abs(end[0] - start[0]) + abs(end[1] - start[1])
    if not dash or length <= dash:
        return [(*start, *end)]
    step = dash * 5 / 3
    count = max(1, round((length - dash) / step))
    # Stretch the period so that a dash ends in each corner: corners are what the eye compares.
    period = (length - dash) / count
    pieces = []
    for index in range(count + 1):
        a, b = index * period / length, (index * period + dash) / length
        pieces.append(tuple(start[axis] + (end[axis] - start[axis]) * t for t in (a, b) for axis in (0, 1)))
    return pieces


def _draw_legend(pen: ImageDraw.ImageDraw, legend, origin: tuple[int, int], font: ImageFont.FreeTypeFont) -> None:
    x, y = origin
    for name, color, dash in legend:
        for piece in _dashes((x, y + 9), (x + 34, y + 9), dash):
            pen.line(piece, fill=color, width=_LINE_WIDTH)
        pen.text((x + 42, y), name, font=font, fill=_INK)
        x += round(font.getlength(name)) + 62


def _verdict(truth: Sequence[Box], predicted: Sequence[Box], visible: Sequence[Box | None]) -> str:
    if not predicted:
        return "no box"
    outside = "" if any(visible) else " (outside)"
    return f"IoU {grounding_iou(predicted, truth):.2f}{outside}" if truth else f"no true box{outside}"


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int = 3) -> list[str]:
    """Break text into lines no wider than ``width`` pixels; the last of them ends in an ellipsis if more follows."""
    lines = [""]
    for word in text[:1000].split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while lines[-1] and font.getlength(lines[-1] + "...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + "..."
    return lines
