"""Turn the boxes of a data file into original pixels, and say which frame a box fits where it does not fit its own.

=================== ================================================================================================
frame               a box that covers the whole W x H picture
=================== ================================================================================================
pixels              0, 0, W, H: pixels of the picture as stored
relative_1          0, 0, 1, 1: shares of its width and height
relative_1000       0, 0, 1000, 1000: thousandths of its width and height
relative_1_square   shares of the picture padded to a square, the picture in the middle, as LLaVA-1.5 pads (its
                    ``expand2square``; LLaVA threads 606, 822)
=================== ================================================================================================
"""

from __future__ import annotations

import math
from typing import Any, Sequence

from megavg.data.sample import SampleError

PIXELS = "pixels"
FRAMES = (PIXELS, "relative_1", "relative_1000", "relative_1_square")
LAYOUTS = ("xyxy", "xywh")
_ROUNDING = {"relative_1_square": 0.00501}  # in units of the frame; a little more than half of the last decimal
_MAX_SIDE = 2**31 - 1  # of a PNG, the largest of the formats that shards hold


def check_frame(frame: str) -> None:
    """Raise ``ValueError`` unless ``frame`` is one of ``FRAMES``."""
    if frame not in FRAMES:
        raise ValueError(f"unknown frame {frame!r} of the boxes; expected one of {', '.join(FRAMES)}")


def from_xywh(box: Any) -> Any:
    """(x, y, width, height) -> (x0, y0, x1, y1); what is not four numbers stays as it is, for the check of boxes."""
    if not _are_numbers(box):
        return box
    x, y, width, height = box
    return [x, y, x + width, y + height]


def boxes_to_px(boxes: Any, frame: str, width: Any, height: Any, clip_px: float, where: str, key: str) -> Any:
    """Boxes of ``frame`` in pixels of the ``width`` x ``height`` picture, small overhang cut off.

    Overhang is small up to ``clip_px``, or to what the frame's own rounding makes: LLaVA writes two decimals.

    What is not four numbers stays as it is: ``megavg.data.sample.check_boxes`` refuses it in words.

    Raises:
        SampleError: the picture is larger than any format allows ("bad json"); a box does not fit into its frame ("box
            outside image"), or lies within the first pixel although it should be counted in pixels or thousandths
            ("empty box"); the frames that it would fit are named.
    """
    sizes_are_known = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in (width, height))
    if not isinstance(boxes, (list, tuple)) or not sizes_are_known:
        return boxes
    if max(width, height) > _MAX_SIDE:
        raise SampleError(where, key, "bad json", f"a width or height of more than {_MAX_SIDE} pixels is no picture's")
    return [_box_to_px(box, frame, width, height, clip_px, where, key) if _are_numbers(box) else box for box in boxes]


def _box_to_px(box: Sequence[float], frame: str, width: int, height: int, clip_px: float, where: str,
               key: str) -> list[float]:
    box_px = _scaled(box, frame, width, height)
    clip_px = max(clip_px, _ROUNDING.get(frame, 0.0) * max(width, height))
    if not _is_outside(box_px, width, height, clip_px):
        if frame in (PIXELS, "relative_1000") and max(box) <= 1 and box[2] > box[0] and box[3] > box[1]:
            raise SampleError(where, key, "empty box", f"{list(box)} in the frame {frame!r} is smaller than a pixel; "
                              f"it fits the frame {_fitting(box, frame, width, height)}")
        return _clipped(box_px, width, height)
    # A box a little over the edge is a slip of the annotation, not another frame.
    is_far_out = _is_outside(box_px, width, height, 0.1 * max(width, height))
    overhang = max(-box_px[0], -box_px[1], box_px[2] - width, box_px[3] - height)
    hint = f"; it would fit the frame {_fitting(box, frame, width, height)}" if is_far_out else \
        f" by {overhang:.3g} pixels; allow so much with clip (--clip), or leave it out"
    raise SampleError(where, key, "box outside image",
                      f"{list(box)} in the frame {frame!r} leaves the {width} x {height} image{hint}")


def _scaled(box: Sequence[float], frame: str, width: int, height: int) -> list[float]:
    if frame == PIXELS:
        return list(box)
    x0, y0, x1, y1 = map(float, box)
    if frame == "relative_1_square":
        side = max(width, height)
        # expand2square pastes at whole pixels.
        left, top = (side - width) // 2, (side - height) // 2
        return [x0 * side - left, y0 * side - top, x1 * side - left, y1 * side - top]
    extent = 1000 if frame == "relative_1000" else 1
    return [x0 * width / extent, y0 * height / extent, x1 * width / extent, y1 * height / extent]


def _is_outside(box_px: Sequence[float], width: int, height: int, clip_px: float) -> bool:
    x0, y0, x1, y1 = box_px
    return x0 < -clip_px or y0 < -clip_px or x1 > width + clip_px or y1 > height + clip_px


def _clipped(box_px: Sequence[float], width: int, height: int) -> list[float]:
    x0, y0, x1, y1 = box_px
    return [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]


def _fitting(box: Sequence[float], frame: str, width: int, height: int) -> str:
    """Names of the other frames that ``box`` fits, the finest first: all of 0..1 fits the coarser ones as well."""
    if max(box) <= 1:
        names = ["relative_1", "relative_1_square"]
    else:
        names = [PIXELS, "relative_1000"]
    found = [name for name in names if name != frame and not _is_outside(_scaled(box, name, width, height), width,
                                                                         height, 0.5)]
    return " or ".join(repr(name) for name in found) or "none of " + ", ".join(FRAMES)


def _are_numbers(box: Any) -> bool:
    """Whether ``box`` is four finite numbers."""
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return False
    for value in box:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        try:
            if not math.isfinite(value):
                return False
        except OverflowError:
            return False
    return True
