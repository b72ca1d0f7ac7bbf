"""Geometry of boxes in plain Python: overlap, validity, clipping and one-to-one matching.

A box is ``(x0, y0, x1, y1)`` with exclusive ``x1, y1`` in continuous coordinates, so its area is
``(x1 - x0) * (y1 - y0)``. Every function works in any frame as long as both boxes are in the same one. Model answers
come through here: NaN, infinities and degenerate boxes never raise and never score.
"""

from __future__ import annotations

import math
from typing import Callable, Sequence

from megavg.protocols.sample import Box


def is_degenerate(box: Box) -> bool:
    """True when the box has no area: a corner that is not finite, or ``x1 <= x0`` or ``y1 <= y0``."""
    return not (all(map(math.isfinite, box)) and box[2] > box[0] and box[3] > box[1])


def is_valid(box: Box, width: float, height: float) -> bool:
    """True when the box has an area and lies wholly inside a ``width`` x ``height`` image, edges included."""
    return not is_degenerate(box) and box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height


def area(box: Box) -> float:
    """Area in squared units of the box's frame; 0 for a degenerate box."""
    return 0.0 if is_degenerate(box) else (box[2] - box[0]) * (box[3] - box[1])


def center(box: Box) -> tuple[float, float]:
    """Middle of the box as ``(x, y)``."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def contains(box: Box, point: tuple[float, float]) -> bool:
    """True when the point ``(x, y)`` lies inside the box or on its edge; a degenerate box contains nothing."""
    return not is_degenerate(box) and box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def clip(box: Box, width: float, height: float) -> Box:
    """Cut the box to a ``width`` x ``height`` image; a box wholly outside becomes degenerate."""
    x0, x1 = (min(max(x, 0.0), float(width)) for x in (box[0], box[2]))
    y0, y1 = (min(max(y, 0.0), float(height)) for y in (box[1], box[3]))
    return x0, y0, x1, y1


def _overlap(a: Box, b: Box) -> tuple[float, float]:
    """Areas of the intersection and of the union."""
    intersection = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return intersection, area(a) + area(b) - intersection


def iou(a: Box, b: Box) -> float:
    """Intersection over union, 0..1; 0 when either box is degenerate or not finite."""
    if is_degenerate(a) or is_degenerate(b):
        return 0.0
    intersection, union = _overlap(a, b)
    # Sides near the float limits overflow (union inf) or underflow (union 0): such boxes do not score.
    return min(intersection / union, 1.0) if 0 < union < math.inf else 0.0


def giou(a: Box, b: Box) -> float:
    """Generalised IoU, -1..1: the IoU minus the empty share of the smallest box around both.

    A degenerate or not finite box gives the lowest value, -1, so that it never beats an honest miss.

    Source: Rezatofighi et al., "Generalized Intersection over Union", arXiv 1902.09630.
    """
    if is_degenerate(a) or is_degenerate(b):
        return -1.0
    intersection, union = _overlap(a, b)
    hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    if not (0 < union < math.inf and 0 < hull < math.inf):
        return -1.0
    return max(min(intersection / union - (hull - union) / hull, 1.0), -1.0)


def match(
    predicted: Sequence[Box], truth: Sequence[Box], score: Callable[[Box, Box], float] = iou
) -> list[tuple[int, int, float]]:
    """Pair predicted with true boxes one to one, greedily in the order of ``predicted`` (most confident first).

    Each predicted box takes the free true box that scores highest with it, the first of equals; a score of 0 makes no
    pair.

    Args:
        predicted: N boxes, in the order of confidence, or as answered where the model states none.
        truth: M boxes in the same frame.
        score: function of (predicted box, true box), higher is better.

    Returns:
        ``(index in predicted, index in truth, score)`` for each pair, in the order of ``predicted``.
    """
    free = list(range(len(truth)))
    pairs = []
    for i, box in enumerate(predicted):
        if not free:
            break
        scores = [score(box, truth[j]) for j in free]
        best = max(range(len(free)), key=scores.__getitem__)
        if scores[best] > 0:
            pairs.append((i, free.pop(best), scores[best]))
    return pairs


def by_confidence(scores: Sequence[float | None]) -> list[int]:
    """Indices of boxes by falling confidence, where every box states one; else in the order of the answer.

    Of equal scores the first stays first. A confidence that only some boxes state ranks nothing.
    """
    if any(score is None for score in scores):
        return list(range(len(scores)))
    return sorted(range(len(scores)), key=lambda i: -scores[i])
