"""Turn one answer into one row: what was asked, what was answered, how far it is right and why not, by its task.

Training, evaluation during training and ``megavg/evaluate.py`` all score with :func:`answer_row`, which reads the
answer with the parsers that the rewards use.
"""

from __future__ import annotations

import math
from typing import Sequence

from megavg.ops.answer_text import class_name, normal_name, says_none
from megavg.ops.box_text import ParsedBoxes, parse_boxes
from megavg.ops.boxes import by_confidence, center, contains, iou, match
from megavg.ops.point_text import parse_points
from megavg.protocols.sample import Box, Completion, Sample
from megavg.rewards.base import check_frame

GROUP_FIELDS = ("dataset", "split_by", "split", "platform", "data_type", "group")
"""Fields of a sample's meta that tables break figures down by; a row keeps those that the sample has."""


def grounding_iou(predicted: Sequence[Box], truth: Sequence[Box], scores: Sequence[float | None] = ()) -> float:
    """Overlap of one answer with the truth, 0..1; both in the same frame.

    With one true box only the FIRST answered box counts, whatever confidence it states, as in RefCOCO evaluation:
    answering many boxes must not help. The reward ``iou`` takes the first by confidence that overlaps, and divides by
    the number of boxes. With several true boxes it is that reward's measure: the boxes, by falling confidence where
    every one states it and else in the order of the answer, are matched greedily, and the sum of matched IoUs is
    divided by max(true, predicted).

    Args:
        scores: the confidence of each predicted box, None where it states none; empty means that none does.
    """
    if not predicted or not truth:
        return 0.0
    if len(truth) == 1:
        return iou(predicted[0], truth[0])
    ranked = [predicted[i] for i in by_confidence(scores)] if scores else predicted
    return sum(overlap for _, _, overlap in match(ranked, truth)) / max(len(truth), len(predicted))


def answer_row(sample: Sample, completion: Completion, keep: Sequence[str] = GROUP_FIELDS) -> dict:
    """Score one answer by ``sample.task``; never raises because of what the model wrote.

    Args:
        sample: the truth; its picture is not looked at.
        completion: the answer, with the frame of this sample's picture.
        keep: names in ``sample.meta`` that the row keeps, for tables.

    Returns:
        A dictionary of JSON values. Every task: key, shard, task, expression, text, truncated, meta, parsed (the answer
        could be read), correct, iou (0..1, 0 where no box was answered), predicted_boxes_px, true_boxes_px, and reason
        ("ok" or a few words to count). By task:

        - rec: iou as :func:`grounding_iou` says; correct is IoU > 0.5; center_in_box (the first answered box's centre
          lies in a true box, edges included).
        - point: predicted_points_px; correct, and center_in_box, when the first point lies in a true box, edges
          included; miss_px, its distance to the nearest true box, None without a point.
        - detection: predicted_labels and predicted_scores (one per box, None where not stated), true_labels, width,
          height; iou is the sum of matched IoUs of equal labels over max(true, predicted), and 1 where "none" was
          answered to a picture without objects; correct when every object was found with IoU > 0.5 and nothing else.
        - classification: predicted_class, true_labels; correct when it is one of them.

        Labels are compared, and stand in the row, as ``megavg.ops.class_text.normal_name`` writes them.

    Raises:
        ValueError: the completion's frame was made for an image of another size, or the task is unknown.
    """
    check_frame(completion, sample)
    if sample.task not in _BY_TASK:
        raise ValueError(f"sample {sample.key!r} of {sample.shard!r} has task {sample.task!r}, expected one of "
                         f"{', '.join(_BY_TASK)}; build its shard again")
    return {
        "key": sample.key,
        "shard": sample.shard,
        "task": sample.task,
        "expression": sample.expression,
        "text": completion.text,
        "truncated": completion.truncated,
        "meta": {name: sample.meta[name] for name in keep if name in sample.meta},
        "true_boxes_px": [list(box) for box in sample.boxes_xyxy_px],
        **_BY_TASK[sample.task](sample, completion),
    }


def _read_boxes(completion: Completion) -> ParsedBoxes:
    return parse_boxes(completion.text, completion.frame, completion.box_format)


def _rec(sample: Sample, completion: Completion) -> dict:
    answer = _read_boxes(completion)
    predicted, truth = answer.boxes_px, sample.boxes_xyxy_px
    overlap = grounding_iou(predicted, truth, answer.scores)
    reason = answer.reason
    if predicted:
        reason = "ok" if overlap > 0.5 else "low overlap" if overlap > 0 else "no overlap"
    return {
        "predicted_boxes_px": [list(box) for box in predicted], "iou": overlap, "parsed": bool(predicted),
        "correct": overlap > 0.5, "reason": reason,
        "center_in_box": bool(predicted) and any(contains(box, center(predicted[0])) for box in truth)}


def _point(sample: Sample, completion: Completion) -> dict:
    answer = parse_points(completion.text, completion.frame, completion.box_format)
    points, truth = answer.points_px, sample.boxes_xyxy_px
    first = answer.boxes_px[0] if points else None
    hit = bool(points) and any(contains(box, points[0]) for box in truth)
    return {
        "predicted_boxes_px": [list(box) for box in answer.boxes_px if box],
        "predicted_points_px": [list(point) for point in points], "parsed": bool(points), "correct": hit,
        "iou": max((iou(first, box) for box in truth), default=0.0) if first else 0.0, "center_in_box": hit,
        "miss_px": min((_distance(points[0], box) for box in truth), default=None) if points else None,
        "reason": ("ok" if hit else "outside the box") if points else answer.reason}


def _distance(point: tuple[float, float], box: Box) -> float:
    """From a point to the nearest point of a box, 0 inside."""
    return math.hypot(max(box[0] - point[0], 0.0, point[0] - box[2]), max(box[1] - point[1], 0.0, point[1] - box[3]))


def _detection(sample: Sample, completion: Completion) -> dict:
    answer = _read_boxes(completion)
    predicted, truth = answer.boxes_px, sample.boxes_xyxy_px
    nothing = not predicted and says_none(completion.text)
    labels = [label and normal_name(label) for label in answer.labels]
    true_labels = [normal_name(label) for label in sample.labels]
    order = by_confidence(answer.scores)
    found = _found([predicted[i] for i in order], [labels[i] for i in order], truth, true_labels)
    num_right = sum(overlap > 0.5 for overlap in found)
    whole = bool(predicted or nothing) and num_right == len(truth) == len(predicted)
    return {
        "predicted_boxes_px": [list(box) for box in predicted], "predicted_labels": labels,
        "predicted_scores": list(answer.scores), "true_labels": true_labels, "width": sample.width,
        "height": sample.height, "parsed": bool(predicted) or nothing, "correct": whole,
        "iou": float(nothing) if not truth and not predicted else sum(found) / max(len(truth), len(predicted)),
        "reason": _detection_reason(answer.reason, nothing, whole, num_right, len(predicted), len(truth))}


def _found(predicted: Sequence[Box], labels: Sequence, truth: Sequence[Box], true_labels: Sequence) -> list[float]:
    """IoU of every pair of equal labels, matched greedily in the order of ``predicted``."""
    overlaps = []
    for name in dict.fromkeys(label for label in true_labels if label):
        ours = [box for box, label in zip(predicted, labels) if label == name]
        theirs = [box for box, label in zip(truth, true_labels) if label == name]
        overlaps += [overlap for _, _, overlap in match(ours, theirs)]
    return overlaps


def _detection_reason(parser: str, nothing: bool, whole: bool, num_right: int, num_predicted: int,
                      num_true: int) -> str:
    if not num_predicted and not nothing:
        return parser
    if whole:
        return "ok"
    if not num_true:
        return "nothing is there"
    if nothing:
        return "said there is nothing"
    if not num_right:
        return "no object found"
    return "missing boxes" if num_right < num_true else "extra boxes"


def _classification(sample: Sample, completion: Completion) -> dict:
    name, right = class_name(completion.text), [normal_name(label) for label in sample.labels]
    correct = bool(name) and name in right
    return {
        "predicted_boxes_px": [], "predicted_class": name, "true_labels": right, "parsed": bool(name), "iou": 0.0,
        "correct": correct, "reason": "ok" if correct else "wrong class" if name else "empty answer"}


_BY_TASK = {"rec": _rec, "point": _point, "detection": _detection, "classification": _classification}
