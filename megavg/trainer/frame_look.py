"""Read one answer in every frame of coordinates that models use, and compare each reading with the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from megavg.ops.box_formats import TOKENS
from megavg.ops.box_scan import read_boxes
from megavg.ops.boxes import contains, iou, match
from megavg.ops.class_text import says_none
from megavg.ops.point_scan import read_points
from megavg.protocols.sample import RELATIVE_1000, RESIZED_PX, Box, Completion, Frame, Sample

UNITS = {RELATIVE_1000: "0..1000 of the image", RESIZED_PX: "pixels of the resized image",
         "original_px": "pixels of the original image", "relative_1": "0..1 of the image"}
ORDERS = {"xy": "", "yx": ", y before x"}
CANDIDATES = tuple((unit, order) for order in ORDERS for unit in UNITS)
"""The frames that are compared: a unit and the order of the two coordinates."""

OWN, OTHER = "own", "other"
"""How numbers are written: as the run's box format has it, or as those of the other kind (JSON or box tokens) do."""


@dataclass(frozen=True)
class Look:
    """What one answer says.

    Attributes:
        key, asked, text: the sample, the question ("" where it is not known), and the answer.
        written: ``OWN``, ``OTHER``, or "" where its numbers cannot be read either way.
        reason: of the run's own parser.
        truncated: it hit the length limit.
        overlaps: for each of ``CANDIDATES``, how well the answer fits when it is read so: the overlap with the true
            boxes as the IoU reward counts it, in the order of the answer, or for a point 1 inside a true box and 0
            outside. Empty where not read.
    """

    key: str
    asked: str
    text: str
    written: str
    reason: str
    truncated: bool
    overlaps: tuple[float, ...]


def look_at(completion: Completion, sample: Sample, asked: str = "") -> Look:
    """Read one answer in every frame and compare it with the truth, which must hold a box."""
    formats = {OWN: completion.box_format, OTHER: "json_relative_1000" if completion.box_format == TOKENS else TOKENS}
    found = {written: _numbers(completion.text, box_format, sample.task) for written, box_format in formats.items()}
    written = next((written for written, (numbers, _) in found.items() if numbers), "")
    overlaps: tuple[float, ...] = ()
    if written:
        overlaps = tuple(_overlap([to_px(box, unit, order, completion.frame) for box in found[written][0]], sample)
                         for unit, order in CANDIDATES)
    elif sample.task == "detection" and says_none(completion.text):
        written, overlaps = OWN, (0.0,) * len(CANDIDATES)  # it can be read, and is wrong in every frame
    return Look(sample.key, asked, completion.text, written, found[OWN][1], completion.truncated, overlaps)


def true_boxes(sample: Sample) -> list[Box]:
    """The boxes of a sample as they are without label noise; none for a task that has none."""
    if sample.task == "classification":
        return []
    return [tuple(box) for box in sample.meta.get("clean_boxes_xyxy_px", sample.boxes_xyxy_px)]


def to_px(numbers: Sequence[float], unit: str, order: str, frame: Frame) -> Box:
    """Read the four numbers of a text in one of ``UNITS`` and ``ORDERS``; original pixels."""
    x0, y0, x1, y1 = numbers if order == "xy" else (numbers[1], numbers[0], numbers[3], numbers[2])
    original = frame.original_width, frame.original_height
    width, height = {RELATIVE_1000: (1000, 1000), RESIZED_PX: (frame.resized_width, frame.resized_height),
                     "original_px": original, "relative_1": (1, 1)}[unit]
    sx, sy = original[0] / width, original[1] / height
    return x0 * sx, y0 * sy, x1 * sx, y1 * sy


def _numbers(text: str, box_format: str, task: str) -> tuple[list[tuple[float, ...]], str]:
    """What the answer holds, in the units of its text, and the parser's reason: boxes, or points as boxes without
    an extent."""
    if task == "point":
        points, reason = read_points(text, box_format)
        return [(*point, *point) for point, _ in points], reason
    boxes, reason = read_boxes(text, box_format)
    return [box for box, _ in boxes], reason


def _overlap(found: list[Box], sample: Sample) -> float:
    truth = true_boxes(sample)
    if sample.task == "point":
        return float(any(contains(box, found[0][:2]) for box in truth))
    return sum(overlap for _, _, overlap in match(found, truth, iou)) / max(len(found), len(truth))
