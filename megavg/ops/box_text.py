"""Write boxes as the text a model family answers with, and read them back from whatever the model said.

The forms and their frames stand in ``megavg.ops.box_formats``. Reading is forgiving about what stands around the
boxes and strict about the boxes: nothing is evaluated, nothing is repaired (corners in the wrong order stay wrong), and
one malformed box rejects the whole answer. Every step is linear in the length of the text, and nothing recurses, so
hostile answers cost no more than long ones.

The way from a box to its text and back moves no corner by more than half a unit of the family's frame: half a pixel of
the resized image for Qwen2.5-VL, and 1/2000 of the image's side for the others, which is ``resized side / 2000`` pixels
of the resized image: half a pixel at 1000 pixels, one pixel at 2000. (A side below one unit is written as one unit, and
its corners move by up to a whole one.)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Sequence

from megavg.ops.box_formats import BOX_FORMATS, FRAME_KIND, TOKENS, check_frame_kind
from megavg.ops.box_scan import MAX_BOXES, read_boxes
from megavg.ops.boxes import is_degenerate
from megavg.ops.strict_text import strict_format
from megavg.protocols.sample import Box, Frame

__all__ = ["BOX_FORMATS", "FRAME_KIND", "MAX_BOXES", "ParsedBoxes", "format_boxes", "parse_boxes", "round_box",
           "strict_format"]


@dataclass(frozen=True)
class ParsedBoxes:
    """The boxes of one answer, or why it has none.

    Attributes:
        boxes_px: boxes in original pixels, in the order of the answer, not clipped to the image; empty when the answer
            is rejected.
        reason: "ok", or a few words to count: "empty answer", "no answer", "no JSON", "no box", "not four numbers",
            "not finite", "huge number", "degenerate box", "too many boxes".
        labels: one class per box as the answer writes it, None where it gives none.
        scores: one confidence per box, None where the answer gives none.
    """

    boxes_px: tuple[Box, ...]
    reason: str
    labels: tuple[str | None, ...] = ()
    scores: tuple[float | None, ...] = ()

    def __post_init__(self):
        for name in ("labels", "scores"):
            if not getattr(self, name):
                object.__setattr__(self, name, (None,) * len(self.boxes_px))


def format_boxes(boxes_px: Sequence[Box], frame: Frame, box_format: str) -> str:
    """Write true boxes as the answer that SFT learns, with whole numbers in the family's own frame.

    Corners are rounded to the nearest unit of the frame; a box narrower than one unit is widened to one, for a
    degenerate box is an answer no parser accepts.

    Args:
        boxes_px: one or more boxes in original pixels.
        frame: sizes of this image before and after the processor's resize.
        box_format: one of ``BOX_FORMATS``.

    Raises:
        ValueError: no box, a degenerate box, an unknown format, or a frame of another family.
    """
    check_frame_kind(frame, box_format)
    if not boxes_px:
        raise ValueError("expected at least one box to write, got none; leave samples without boxes out of the shards")
    answers = [round_box(box, frame) for box in boxes_px]
    if box_format == TOKENS:
        return "".join(f"<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>" for x0, y0, x1, y1 in answers)
    objects = [{"bbox_2d": answer} for answer in answers]
    return json.dumps(objects[0] if len(objects) == 1 else objects)


def parse_boxes(text: str, frame: Frame, box_format: str) -> ParsedBoxes:
    """Read the boxes of a model's answer into original pixels; never raises because of ``text``.

    Only the part inside ``<answer>`` counts where there is one (the last one), else the part after ``</think>``. For
    the JSON formats every list under a ``bbox_2d`` or ``bbox`` key is a box, wherever it stands; without such a key,
    every bare list of four numbers. For the token format every ``(x0,y0),(x1,y1)`` after ``<|box_start|>``; without
    that token, every such pair, since decoding may have dropped it.

    A key in quotes and a colon with anything but a list of numbers behind them (or a list of such lists), or a box
    token without ``<|box_end|>``, is a malformed box. So is what an answer breaks off with: one that ends inside of an
    object or a list, or after a reference to a thing whose box is missing, has no box at all, also where earlier boxes
    are whole.

    The label of a box is the string under ``label``, ``class``, ``class_name``, ``category`` or ``name`` in the same
    JSON object, or the last ``<|object_ref_start|>name<|object_ref_end|>`` before it; its score the number under
    ``score`` or ``confidence``.

    Raises:
        ValueError: an unknown format, or a frame of another family: mistakes of the caller.
    """
    check_frame_kind(frame, box_format)
    boxes, reason = read_boxes(text, box_format)
    return ParsedBoxes(tuple(frame.to_px(box) for box, _ in boxes), reason,
                       tuple(beside.label for _, beside in boxes), tuple(beside.score for _, beside in boxes))


def round_box(box_px: Box, frame: Frame) -> list[int]:
    """A box of original pixels in whole units of the frame, at least one unit wide and high.

    Raises:
        ValueError: the box is degenerate.
    """
    box = frame.from_px(box_px)
    if is_degenerate(box):
        raise ValueError(f"expected a box (x0, y0, x1, y1) with x1 > x0 and y1 > y0, got {box_px} (original pixels); "
                         "leave it out of the shards")
    rounded = [math.floor(value + 0.5) for value in box]
    for low, high in ((0, 2), (1, 3)):
        if rounded[high] <= rounded[low]:
            rounded[low] = math.floor((box[low] + box[high]) / 2)
            rounded[high] = rounded[low] + 1
    return rounded
