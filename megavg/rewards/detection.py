"""Reward detections by their mean average precision on the one picture, in original pixels."""

from __future__ import annotations

from typing import Literal

from megavg.ops.answer_text import normal_name
from megavg.ops.average_precision import IOU_THRESHOLDS, Detections, mean_average_precision
from megavg.ops.boxes import by_confidence
from megavg.ops.box_text import parse_boxes
from megavg.protocols.sample import Completion, RewardResult, Sample
from megavg.rewards.iou import none_result

_NAMELESS = " "  # of a true label that is no name; no answered label is ever written so


def reward(
    completion: Completion,
    sample: Sample,
    *,
    mode: Literal["map", "map50"] = "map",
    length_penalty: bool = True,
    match_labels: bool = True,
) -> RewardResult:
    """Score the answer by its mean average precision, 0..1, by COCO's conventions.

    The mean goes over the classes that are true or answered: a class that is answered and not there counts 0. Boxes
    rank by the confidence that the answer states for each, or else in the order of the answer. Where there is no true
    box, an answer that says so ("None", "[]") scores 1.

    Args:
        completion: the answer and the frame it is written in.
        sample: the true boxes and, one for each, their classes in ``labels``; without labels all are of one class, and
            the answer's labels are not looked at.
        mode: "map" for IoU 0.50:0.05:0.95, "map50" for 0.50.
        length_penalty: multiply by ``min(1, true boxes / answered boxes)``: VLM-R1's odLength [exact, from its released
            code; there classes that are not true are left out]. Without it boxes after the right ones cost nothing,
            and the model learns to fill the picture. It is on by default [ours]: VLM-R1's released code offers both.
        match_labels: compare classes, without regard to case, blanks, quotes and a final stop; a box without a label
            is of no true class, nor does any box find a true label that is no name. False takes all boxes as one
            class.

    Returns:
        The score, and "ok" (1), "extra boxes" (all true boxes found, and more boxes than these answered), "some right",
        "no box right", "no label", "no true box", "rightly none", "wrongly none" or the parser's reason.
    """
    answer = parse_boxes(completion.text, completion.frame, completion.box_format)
    truth, predicted = sample.boxes_xyxy_px, answer.boxes_px
    if not predicted:
        return none_result(completion, sample) or RewardResult(0.0, answer.reason)
    if not truth:
        return RewardResult(0.0, "no true box")
    if match_labels and sample.labels:
        labels = [normal_name(label or "") for label in answer.labels]
        truth_labels = [normal_name(label) or _NAMELESS for label in sample.labels]
        if not any(labels):
            return RewardResult(0.0, "no label")
    else:
        truth_labels, labels = [""] * len(truth), [""] * len(predicted)
    order = by_confidence(answer.scores)
    scores = [0.0] * len(order) if None in answer.scores else answer.scores
    picture = Detections(truth, truth_labels, [predicted[i] for i in order], [labels[i] for i in order],
                         [scores[i] for i in order])
    thresholds = IOU_THRESHOLDS if mode == "map" else IOU_THRESHOLDS[:1]
    score = mean_average_precision([picture], thresholds, punish_other_classes=True) or 0.0
    if score > 1 - 1e-9:  # COCO's precision of a perfect answer is a rounding error below 1
        score = 1.0
    all_found = score == 1
    if length_penalty:
        score *= min(1.0, len(truth) / len(predicted))
    if all_found:
        return RewardResult(score, "extra boxes" if len(predicted) > len(truth) else "ok")
    return RewardResult(score, "some right" if score > 0 else "no box right")
