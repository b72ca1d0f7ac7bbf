"""Write boxes as the text a model family answers with, and read them back from whatever the model said.

Three box formats exist, each with one frame of coordinates (``FRAME_KIND``):

======================  ==========  ========================================================
box format              family      text of one box
======================  ==========  ========================================================
json_relative_1000      Qwen3-VL    ``{"bbox_2d": [x0, y0, x1, y1]}``, 0..1000 of the image
json_resized_px         Qwen2.5-VL  the same, in pixels of the image the processor resized
tokens_relative_1000    Qwen2-VL    ``<|box_start|>(x0,y0),(x1,y1)<|box_end|>``, 0..1000
======================  ==========  ========================================================

Reading is forgiving about what stands around the boxes and strict about the boxes: nothing is evaluated, nothing is
repaired (corners in the wrong order stay wrong), and one malformed box rejects the whole answer. Every step is linear
in the length of the text, and nothing recurses, so hostile answers cost no more than long ones.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Iterator, Sequence

from megavg.ops.boxes import is_degenerate
from megavg.protocols.plugin import nearest
from megavg.protocols.sample import RELATIVE_1000, RESIZED_PX, Box, Frame

FRAME_KIND = {
    "json_relative_1000": RELATIVE_1000,
    "json_resized_px": RESIZED_PX,
    "tokens_relative_1000": RELATIVE_1000,
}
BOX_FORMATS = tuple(FRAME_KIND)

MAX_BOXES = 1000
"""An answer with more boxes is rejected: matching costs predicted x true boxes."""
MAX_COORDINATE = 1e6
"""A coordinate beyond this is no position in any picture; it would only invite overflow."""
MAX_DIGITS = 64
"""Characters of one number; converting a longer one can cost more than linear time."""

_KEYS = ("bbox_2d", "bbox")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_FLAT_LIST = re.compile(r"\[([^\[\]{}]*)\]")
_KEY_BEFORE = re.compile(r"""(\w+)["']?\s*:$""")
_CORNERS = re.compile(r"(<\|box_start\|>\s*)?\(([^(),]*,[^(),]*)\)\s*,\s*\(([^(),]*,[^(),]*)\)")

_STRICT_NUMBER = r"-?[0-9]{1,7}(?:\.[0-9]{1,6})?"
_STRICT_LIST = rf"\[\s*{_STRICT_NUMBER}(?:\s*,\s*{_STRICT_NUMBER}){{3}}\s*\]"
_STRICT_LABEL = r'"label"\s*:\s*"(?:[^"\\]|\\.)*"'
_STRICT_OBJECT = (rf'\{{\s*(?:{_STRICT_LABEL}\s*,\s*)?"bbox_2d"\s*:\s*{_STRICT_LIST}'
                  rf'(?:\s*,\s*{_STRICT_LABEL})?\s*\}}')
_STRICT_JSON = re.compile(rf"{_STRICT_OBJECT}|\[\s*{_STRICT_OBJECT}(?:\s*,\s*{_STRICT_OBJECT})*\s*\]")
_STRICT_POINT = rf"\({_STRICT_NUMBER},\s?{_STRICT_NUMBER}\)"
_STRICT_TOKENS = re.compile(rf"(?:<\|box_start\|>{_STRICT_POINT},\s?{_STRICT_POINT}<\|box_end\|>)+")


@dataclass(frozen=True)
class ParsedBoxes:
    """The boxes of one answer, or why it has none.

    Attributes:
        boxes_px: boxes in original pixels, in the order of the answer, not clipped to the image; empty when the answer
            is rejected.
        reason: "ok", or a few words to count: "empty answer", "no answer", "no JSON", "no box", "not four numbers",
            "not finite", "huge number", "degenerate box", "too many boxes".
    """

    boxes_px: tuple[Box, ...]
    reason: str


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
    _check(frame, box_format)
    if not boxes_px:
        raise ValueError("expected at least one box to write, got none; leave samples without boxes out of the shards")
    answers = [_round_to_units(frame.from_px(box), box) for box in boxes_px]
    if box_format == "tokens_relative_1000":
        return "".join(f"<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>" for x0, y0, x1, y1 in answers)
    objects = [{"bbox_2d": answer} for answer in answers]
    return json.dumps(objects[0] if len(objects) == 1 else objects)


def parse_boxes(text: str, frame: Frame, box_format: str) -> ParsedBoxes:
    """Read the boxes of a model's answer into original pixels; never raises because of ``text``.

    Only the part inside ``<answer>`` counts where there is one (the last one), else the part after ``</think>``. For
    the JSON formats every list under a ``bbox_2d`` or ``bbox`` key is a box, wherever it stands; without such a key,
    every bare list of four numbers. For the token format every ``(x0,y0),(x1,y1)`` after ``<|box_start|>``; without
    that token, every such pair, since decoding may have dropped it.

    Raises:
        ValueError: an unknown format, or a frame of another family: mistakes of the caller.
    """
    _check(frame, box_format)
    boxes, reason = _read(text, box_format)
    return ParsedBoxes(tuple(frame.to_px(box) for box in boxes), reason)


def strict_format(text: str, box_format: str, thinking: bool | None = None) -> str | None:
    """Say why the text is not exactly one well-formed answer; None when it is.

    The answer is the JSON of one ``{"bbox_2d": [four numbers]}`` or a list of them, each with an optional string
    ``label``, plain or in a ```` ```json ```` fence; for the token format one or more boxes between their box tokens.

    Args:
        text: the whole decoded answer.
        box_format: one of ``BOX_FORMATS``.
        thinking: True demands ``<think>...</think><answer>...</answer>`` around the answer, False forbids it, None
            takes either.
    """
    _check_format(box_format)
    body = text.strip()
    if not body:
        return "empty answer"
    if thinking or (thinking is None and body.startswith("<think>")):
        inside = _inside_wrapper(body)
        if inside is None:
            return "no <think> and <answer>"
        body = inside
    if box_format == "tokens_relative_1000":
        shape = _STRICT_TOKENS
    else:
        shape = _STRICT_JSON
        if len(body) > 6 and body.startswith("```") and body.endswith("```"):
            body = body[3:-3].removeprefix("json").strip()
    boxes, reason = _read(body, box_format)
    if not boxes:
        return reason
    return None if shape.fullmatch(body) else "text around the boxes"


def _check_format(box_format: str) -> None:
    if box_format not in FRAME_KIND:
        raise ValueError(f"box format {box_format!r} does not exist{nearest(box_format, BOX_FORMATS)}")


def _check(frame: Frame, box_format: str) -> None:
    _check_format(box_format)
    if frame.kind != FRAME_KIND[box_format]:
        raise ValueError(f"box format {box_format!r} is written in the frame {FRAME_KIND[box_format]!r}, got a frame "
                         f"of kind {frame.kind!r}; make the frame with FRAME_KIND[box_format]")


def _round_to_units(box: Box, box_px: Box) -> list[int]:
    if is_degenerate(box):
        raise ValueError(f"expected a box (x0, y0, x1, y1) with x1 > x0 and y1 > y0, got {box_px} (original pixels); "
                         "leave it out of the shards")
    rounded = [math.floor(value + 0.5) for value in box]
    for low, high in ((0, 2), (1, 3)):
        if rounded[high] <= rounded[low]:
            rounded[low] = math.floor((box[low] + box[high]) / 2)
            rounded[high] = rounded[low] + 1
    return rounded


def _answer_part(text: str) -> str | None:
    """The text that counts as the answer; None while the model is still thinking."""
    if "<answer>" in text:
        return text.rpartition("<answer>")[2].partition("</answer>")[0]
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return None if "<think>" in text else text


def _inside_wrapper(body: str) -> str | None:
    """What stands between ``<answer>`` and ``</answer>``; None unless the wrapper is whole, single and not empty."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(body.count(tag) != 1 for tag in tags) or not body.startswith(tags[0]) or not body.endswith(tags[3]):
        return None
    thought, _, rest = body[len(tags[0]):-len(tags[3])].partition(tags[1])
    between, found, answer = rest.partition(tags[2])
    return answer.strip() if found and thought.strip() and not between.strip() else None


def _read(text: str, box_format: str) -> tuple[list[Box], str]:
    """Boxes in the units of the text and "ok", or no boxes and the reason."""
    answer = _answer_part(text)
    if answer is None:
        return [], "no answer"
    if not answer.strip():
        return [], "empty answer"
    if box_format == "tokens_relative_1000":
        candidates = _token_candidates(answer)
    elif "[" in answer or "{" in answer:
        candidates = _json_candidates(answer)
    else:
        return [], "no JSON"
    marked: list[str] = []
    bare: list[str] = []
    for is_marked, numbers in candidates:
        (marked if is_marked else bare).append(numbers)
        if len(marked) > MAX_BOXES or len(bare) > MAX_BOXES:
            return [], "too many boxes"
    if not marked and any(map(_looks_like_box, bare)):
        # Without a key, a list that is no box may be anything ("see [1]"): it does not spoil those that are.
        bare = list(filter(_looks_like_box, bare))
    return _numbers_to_boxes(marked or bare)


def _json_candidates(text: str) -> Iterator[tuple[bool, str]]:
    """``(stands under a box key, inside of the list)`` for every innermost list that may be a box."""
    for found in _FLAT_LIST.finditer(text):
        # A window of fixed size keeps the look back at the key linear over the whole text.
        before = text[max(0, found.start() - 48):found.start()].rstrip()
        key = _KEY_BEFORE.search(before) if before.endswith(":") else None
        if key and key.group(1) in _KEYS:
            yield True, found.group(1)
        elif not (key and before[key.start() - 1:key.start()] in ('"', "'")):
            yield False, found.group(1)


def _token_candidates(text: str) -> Iterator[tuple[bool, str]]:
    """``(follows a box token, its four parts)`` for every pair of corners; a box token without corners is malformed."""
    unfilled = text.count("<|box_start|>")
    for found in _CORNERS.finditer(text):
        unfilled -= found.group(1) is not None
        yield found.group(1) is not None, f"{found.group(2)},{found.group(3)}"
    if unfilled:
        yield True, ""


def _looks_like_box(numbers: str) -> bool:
    return numbers.count(",") == 3 and all(_number_fault(part.strip()) != "not four numbers"
                                           for part in numbers.split(","))


def _number_fault(part: str) -> str | None:
    """Why the text is not one usable coordinate; None when it is."""
    if len(part) > MAX_DIGITS:
        return "huge number" if _NUMBER.fullmatch(part) else "not four numbers"
    if _NOT_FINITE.fullmatch(part):
        return "not finite"
    if not _NUMBER.fullmatch(part):
        return "not four numbers"
    return "huge number" if abs(float(part)) > MAX_COORDINATE else None


def _numbers_to_boxes(candidates: list[str]) -> tuple[list[Box], str]:
    boxes: list[Box] = []
    for numbers in candidates:
        if numbers.count(",") != 3:
            return [], "not four numbers"
        parts = [part.strip() for part in numbers.split(",")]
        fault = next(filter(None, map(_number_fault, parts)), None)
        if fault:
            return [], fault
        box = tuple(map(float, parts))
        if is_degenerate(box):
            return [], "degenerate box"
        boxes.append(box)
    return boxes, "ok" if boxes else "no box"
