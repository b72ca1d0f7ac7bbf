"""Write a point as the text a model family answers with, and read points back from whatever the model said."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megavg.ops.box_formats import TOKENS, check_frame_kind
from megavg.ops.boxes import center, contains, is_degenerate
from megavg.ops.point_scan import read_points
from megavg.protocols.sample import Box, Frame

MAX_DECIMALS = 6
"""Decimals of a point in a box so small that no number with fewer lies inside."""


@dataclass(frozen=True)
class ParsedPoints:
    """The points of one answer, or why it has none.

    Attributes:
        points_px: ``(x, y)`` in original pixels, in the order of the answer; empty when the answer is rejected.
        reason: "ok", or a few words to count: "empty answer", "no answer", "no point", "not two numbers",
            "not finite", "huge number", "degenerate box", "too many points".
        boxes_px: one per point: the box that the answer gave and whose centre the point is, None for a plain point.
    """

    points_px: tuple[tuple[float, float], ...]
    reason: str
    boxes_px: tuple[Box | None, ...] = ()

    def __post_init__(self):
        if not self.boxes_px:
            object.__setattr__(self, "boxes_px", (None,) * len(self.points_px))


def format_point(box_px: Box, frame: Frame, box_format: str) -> str:
    """Write the centre of a true box as the answer that SFT learns, in whole numbers of the family's own frame.

    The numbers are rounded to the nearest unit, and lie inside the box; where no whole number does, for the box is
    smaller than a unit, they get as many decimals as it takes.

    Raises:
        ValueError: a degenerate box, an unknown format, or a frame of another family.
    """
    check_frame_kind(frame, box_format)
    if is_degenerate(box_px):
        raise ValueError(f"expected a box (x0, y0, x1, y1) with x1 > x0 and y1 > y0, got {box_px} (original pixels); "
                         "leave it out of the shards")
    x, y = _inside(box_px, frame)
    return f"<|box_start|>({x},{y})<|box_end|>" if box_format == TOKENS else f'{{"point_2d": [{x}, {y}]}}'


def parse_points(text: str, frame: Frame, box_format: str) -> ParsedPoints:
    """Read the points of a model's answer into original pixels; never raises because of ``text``.

    Only the part inside ``<answer>`` counts where there is one (the last one), else the part after ``</think>``. For
    the JSON formats every list of two numbers under a ``point_2d``, ``point`` or ``coordinate`` key is a point; without
    such a key, the centre of every box under a ``bbox_2d`` or ``bbox`` key; without these, every bare list of two or
    four numbers; without these, every ``(x, y)`` or ``(x0, y0, x1, y1)`` in parentheses, as in ``click(x=1, y=2)``. For
    the token format every ``(x,y)`` or ``(x0,y0),(x1,y1)`` after ``<|box_start|>``; without that token, every one. Two
    corners in this form are one box in the JSON formats too.

    One malformed point or box rejects the answer, and so does one that breaks off, as in
    :func:`megavg.ops.box_text.parse_boxes`.

    Raises:
        ValueError: an unknown format, or a frame of another family: mistakes of the caller.
    """
    check_frame_kind(frame, box_format)
    points, reason = read_points(text, box_format)
    return ParsedPoints(tuple(frame.to_px((*point, *point))[:2] for point, _ in points), reason,
                        tuple(box and frame.to_px(box) for _, box in points))


def _inside(box_px: Box, frame: Frame) -> tuple[str, str]:
    """The centre of the box in units of the frame, with the fewest decimals that keep it inside."""
    x, y = center(frame.from_px(box_px))
    for decimals in range(MAX_DECIMALS + 1):
        written = _rounded(x, decimals), _rounded(y, decimals)
        point = tuple(map(float, written))
        if contains(box_px, frame.to_px((*point, *point))[:2]):
            break
    return written


def _rounded(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if decimals else str(math.floor(value + 0.5))
