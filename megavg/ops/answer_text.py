"""Write the answer of every task as its model family writes it, and read what an answer names."""

from __future__ import annotations

import json

from megavg.ops.box_formats import TOKENS, check_frame_kind
from megavg.ops.box_scan import can_read_label
from megavg.ops.box_text import format_boxes, round_box
from megavg.ops.class_text import class_name, normal_name, says_none
from megavg.ops.point_text import format_point
from megavg.ops.text_parts import MAX_LABEL, answer_part
from megavg.protocols.sample import TASKS, Frame, Sample

__all__ = ["NOTHING", "answer_part", "class_name", "format_answer", "normal_name", "says_none"]

NOTHING = "None"
"""What a detection answers where nothing is to be found."""


def format_answer(sample: Sample, frame: Frame, box_format: str) -> str:
    """Write the true answer of a sample as SFT learns it, in the form and the frame of the model family.

    ===============  ============================================  ==================================================
    task             JSON formats                                  token format
    ===============  ============================================  ==================================================
    rec              ``{"bbox_2d": [x0, y0, x1, y1]}``, or a list  ``<|box_start|>(x0,y0),(x1,y1)<|box_end|>`` ...
    point            ``{"point_2d": [x, y]}``                      ``<|box_start|>(x,y)<|box_end|>``
    detection        ``[{"bbox_2d": [...], "label": "king"}]``,    ``<|object_ref_start|>king<|object_ref_end|>`` and
                     or ``None``                                   the box, for each; or ``None``
    classification   the first of the right names                  the same
    ===============  ============================================  ==================================================

    Coordinates are whole numbers. A point is the centre of the first box and lies inside of it.

    Args:
        sample: the task and the truth.
        frame: sizes of this image before and after the processor's resize.
        box_format: one of ``megavg.ops.box_formats.BOX_FORMATS``.

    Raises:
        ValueError: what the task needs is missing or cannot be written; the message names the sample.
    """
    check_frame_kind(frame, box_format)
    try:
        return _written(sample, frame, box_format)
    except ValueError as error:
        raise ValueError(f"{sample.shard or 'a sample made in memory'}: sample {sample.key!r}: {error}") from error


def _written(sample: Sample, frame: Frame, box_format: str) -> str:
    boxes, labels = sample.boxes_xyxy_px, sample.labels
    if sample.task == "rec":
        return format_boxes(boxes, frame, box_format)
    if sample.task == "classification":
        if not labels or not labels[0].strip():
            raise ValueError("a classification needs the name of its class in labels, got none")
        if class_name(labels[0]) != normal_name(labels[0]) or not normal_name(labels[0]):
            raise ValueError(f"the class {labels[0][:300]!r} could not be read back from an answer; rename it")
        return labels[0]
    if sample.task == "point":
        if not boxes:
            raise ValueError("a point needs a true box, got none")
        return format_point(boxes[0], frame, box_format)
    if sample.task != "detection":
        raise ValueError(f"task {sample.task!r} does not exist, expected one of {', '.join(TASKS)}")
    if len(labels) != len(boxes):
        raise ValueError(f"a detection needs one label for each box, got {len(labels)} for {len(boxes)} boxes")
    for label in labels:
        _check_label(label, box_format)
    answers = [round_box(box, frame) for box in boxes]
    if not answers:
        return NOTHING
    if box_format == TOKENS:
        return "".join(f"<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>"
                       for label, (x0, y0, x1, y1) in zip(labels, answers))
    return json.dumps([{"bbox_2d": answer, "label": label} for label, answer in zip(labels, answers)],
                      ensure_ascii=False)


def _check_label(label: str, box_format: str) -> None:
    """A label that the parser could not read back would be learnt and never rewarded."""
    if not normal_name(label) or not can_read_label(label):
        raise ValueError(f"expected a label of 1 to {MAX_LABEL} characters besides quotes and a final stop, got "
                         f"{label[:300]!r}; rename the class")
    if box_format == TOKENS and "<|" in label:
        raise ValueError(f"the label {label!r} holds '<|', which begins a control token; rename the class")
