"""Reward a point, or the centre of a box, that lies inside a true box: clicks on screens."""

from __future__ import annotations

import math

from megavg.ops.boxes import contains, iou
from megavg.ops.point_text import parse_points
from megavg.protocols.sample import Box, Completion, RewardResult, Sample


def reward(
    completion: Completion, sample: Sample, *, iou_weight: float = 0.0, size_weight: float = 0.0
) -> RewardResult:
    """Score ``(hit + iou_weight * IoU + size_weight * size) / (1 + iou_weight + size_weight)``, 0..1.

    ``hit`` is 1 where the answered point, or the centre of the answered box, lies inside any true box, edges included.
    An answer of several points or boxes scores their mean, so further guesses cost what they miss. Plain points have
    neither IoU nor size: with these weights above 0 only boxes reach 1.

    The terms are those of GUI-G1 (arXiv 2505.15810): 1.0 hit + 0.25 IoU + 0.125 size, with ``size`` the harmonic mean
    of ``1 - abs(difference) / side of the image`` over the four corners [exact, from its released code]. The sum is
    divided by its largest value so that it stays in 0..1, and the IoU is the continuous one [ours]. As there, a box
    has the two terms without a hit as well, so any readable box scores a little.

    Args:
        completion: the answer and the frame it is written in.
        sample: the true boxes. IoU and size are those with the true box that the answered one overlaps most.
        iou_weight: 0 or more; GUI-G1 has 0.25.
        size_weight: 0 or more; GUI-G1 has 0.125.

    Returns:
        The score, and "ok", "outside", "partly outside" (some of several points), "no true box" or the parser's
        reason.
    """
    answer = parse_points(completion.text, completion.frame, completion.box_format)
    if not answer.points_px:
        return RewardResult(0.0, answer.reason)
    if not sample.boxes_xyxy_px:
        return RewardResult(0.0, "no true box")
    hits = [any(contains(box, point) for box in sample.boxes_xyxy_px) for point in answer.points_px]
    total = sum(hits)
    if iou_weight or size_weight:
        total += math.fsum(_extra(box, sample, iou_weight, size_weight) for box in answer.boxes_px if box)
    score = total / len(hits) / (1 + iou_weight + size_weight)
    return RewardResult(min(score, 1.0), "ok" if all(hits) else "partly outside" if any(hits) else "outside")


def check_options(iou_weight: float = 0.0, size_weight: float = 0.0) -> None:
    """Raise ValueError on a negative or infinite weight."""
    for name, value in (("iou_weight", iou_weight), ("size_weight", size_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"point_in_box.{name}: expected a weight of 0 or more, got {value!r}")


def _extra(box: Box, sample: Sample, iou_weight: float, size_weight: float) -> float:
    truth = max(sample.boxes_xyxy_px, key=lambda true_box: iou(box, true_box))
    return iou_weight * iou(box, truth) + size_weight * _size(box, truth, sample)


def _size(box: Box, truth: Box, sample: Sample) -> float:
    """Agreement of the four corners, 0..1: GUI-G1's size term."""
    sides = (sample.width, sample.height, sample.width, sample.height)
    agreements = [1 - abs(a - b) / side for a, b, side in zip(box, truth, sides)]
    return 4 / math.fsum(1 / value for value in agreements) if min(agreements) > 0 else 0.0
