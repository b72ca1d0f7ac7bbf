"""Average precision of detections by COCO's conventions, in plain Python, for one picture or many.

Equal to ``pycocotools.cocoeval.COCOeval`` for boxes (area "all", no crowds) to 1e-6, including its order of ties:

- Predictions of a class are taken by falling score; of equal scores, the one of the earlier picture first, and within a
  picture the one that is listed first.
- Within a picture, each takes the free true box that it overlaps most, if by at least the threshold; of equal overlaps,
  the LAST listed true box.
- Precision is made to fall with recall, and read at the 101 recalls 0, 0.01, ..., 1.
- Only the 100 best predictions of a class in a picture count.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", arXiv 1405.0312, and the code of pycocotools.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from typing import Iterable, Sequence

from megavg.ops.boxes import iou
from megavg.protocols.sample import Box

IOU_THRESHOLDS = tuple(0.5 + i * ((0.95 - 0.5) / 9) for i in range(9)) + (0.95,)
"""0.50, 0.55, ..., 0.95 in the floating-point numbers of COCO's evaluation."""
RECALLS = tuple(i * 0.01 for i in range(100)) + (1.0,)
MAX_DETECTIONS = 100
_EPSILON = 2.220446049250313e-16


@dataclass(frozen=True)
class Detections:
    """The true and the predicted boxes of one picture, all in the same frame.

    Attributes:
        truth: M true boxes.
        truth_labels: their M classes.
        predicted: N predicted boxes.
        labels: their N classes.
        scores: their N confidences, any finite numbers; a constant, or none at all, keeps the order of the list.
    """

    truth: Sequence[Box]
    truth_labels: Sequence[str]
    predicted: Sequence[Box]
    labels: Sequence[str]
    scores: Sequence[float] = ()

    def __post_init__(self):
        lengths = {"truth_labels": len(self.truth), "labels": len(self.predicted), "scores": len(self.predicted)}
        for name, length in lengths.items():
            if len(getattr(self, name)) not in ((length, 0) if name == "scores" else (length,)):
                raise ValueError(f"Detections.{name}: expected one for each of {length} boxes, got "
                                 f"{len(getattr(self, name))}")


def mean_average_precision(
    pictures: Sequence[Detections], thresholds: Sequence[float] = IOU_THRESHOLDS, punish_other_classes: bool = False
) -> float | None:
    """Average the precision over classes and thresholds, 0..1.

    Args:
        pictures: in the order that breaks ties.
        thresholds: the IoUs at which a prediction counts as right, edges included; ``(0.5,)`` gives mAP50.
        punish_other_classes: count a class that is only predicted, and never true, as 0. COCO leaves it out.

    Returns:
        The mean; None where no class counts, as there is no true box (COCO gives -1).
    """
    classes = {label for picture in pictures for label in picture.truth_labels}
    others = {label for picture in pictures for label in picture.labels} - classes if punish_other_classes else set()
    if not classes and not others:
        return None
    total = sum(_class_precision(pictures, label, thresholds) for label in sorted(classes))
    return total / (len(classes) + len(others))


def _class_precision(pictures: Sequence[Detections], label: str, thresholds: Sequence[float]) -> float:
    """Average precision of one class with at least one true box, over all thresholds."""
    ranked: list[tuple[float, list[bool]]] = []  # score of a prediction, whether it is right at each threshold
    num_truth = 0
    for picture in pictures:
        truth = [box for box, name in zip(picture.truth, picture.truth_labels) if name == label]
        num_truth += len(truth)
        ranked += _judged(picture, label, truth, thresholds)
    ranked.sort(key=lambda item: -item[0])
    # Most thresholds judge alike: each judgement is read once.
    judgements = Counter(tuple(right[t] for _, right in ranked) for t in range(len(thresholds)))
    return sum(count * _interpolated(right, num_truth) for right, count in judgements.items()) / len(thresholds)


def _judged(picture: Detections, label: str, truth: Sequence[Box],
            thresholds: Sequence[float]) -> list[tuple[float, list[bool]]]:
    """The predictions of one class in one picture, best first, and at which thresholds each is right."""
    scores = picture.scores or [0.0] * len(picture.predicted)
    chosen = [(score, box) for score, box, name in zip(scores, picture.predicted, picture.labels) if name == label]
    chosen.sort(key=lambda item: -item[0])
    chosen = chosen[:MAX_DETECTIONS]
    overlaps = [[iou(box, true_box) for true_box in truth] for _, box in chosen]
    by_threshold = [_matched(overlaps, len(truth), threshold) for threshold in thresholds]
    return [(score, [matched[i] for matched in by_threshold]) for i, (score, _) in enumerate(chosen)]


def _matched(overlaps: Sequence[Sequence[float]], num_truth: int, threshold: float) -> list[bool]:
    """Which predictions, best first, find a true box that is free."""
    free = [True] * num_truth
    matched = []
    for row in overlaps:
        best, best_overlap = -1, min(threshold, 1 - 1e-10)
        for j, overlap in enumerate(row):
            if free[j] and overlap >= best_overlap:
                best, best_overlap = j, overlap
        if best >= 0:
            free[best] = False
        matched.append(best >= 0)
    return matched


def _interpolated(right: Iterable[bool], num_truth: int) -> float:
    """Precision at the 101 recalls, of predictions in falling order of score."""
    recalls: list[float] = []
    precisions: list[float] = []
    hits = 0
    for count, is_right in enumerate(right, 1):
        hits += is_right
        recalls.append(hits / num_truth)
        precisions.append(hits / (count + _EPSILON))
    if not hits:
        return 0.0
    for i in range(len(precisions) - 1, 0, -1):
        precisions[i - 1] = max(precisions[i - 1], precisions[i])
    reached = (bisect_left(recalls, recall) for recall in RECALLS)
    return sum(precisions[i] for i in reached if i < len(precisions)) / len(RECALLS)
