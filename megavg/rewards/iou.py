"""Reward the overlap of the answered boxes with the true ones, in original pixels."""

from __future__ import annotations

from typing import Literal

from megavg.ops.answer_text import says_none
from megavg.ops.boxes import by_confidence, giou, iou, match
from megavg.ops.box_text import parse_boxes
from megavg.protocols.sample import Box, Completion, RewardResult, Sample


def reward(
    completion: Completion,
    sample: Sample,
    *,
    threshold: float | None = None,
    kind: Literal["iou", "giou"] = "iou",
) -> RewardResult:
    """Score the answer by ``sum(overlap of matched pairs) / max(true boxes, answered boxes)``, 0..1.

    Boxes are matched one to one, greedily in the order of the confidence that the answer states for each, or else in
    the order of the answer, so answering more boxes than there are costs as much as missing some. Where there is no
    true box, an answer that says so ("None", "[]") scores 1, but for classification, which has no boxes. An answer
    whose boxes cannot be read scores 0 with the parser's reason.

    Args:
        completion: the answer and the frame it is written in.
        sample: the true boxes; their labels are not looked at.
        threshold: None for the continuous overlap; else a matched pair counts 1 where its IoU is at least this, and 0
            below. In 0 < threshold <= 1; goes with ``kind="iou"`` only.
        kind: "iou"; or "giou" for (GIoU + 1) / 2, which still tells near from far where boxes do not touch.

    Returns:
        The score, and "ok", "no overlap", "below threshold", "extra boxes", "missing boxes", "no true box",
        "rightly none", "wrongly none" or the parser's reason.
    """
    check_options(threshold=threshold, kind=kind)
    answer = parse_boxes(completion.text, completion.frame, completion.box_format)
    truth = sample.boxes_xyxy_px
    predicted = [answer.boxes_px[i] for i in by_confidence(answer.scores)]
    if not predicted:
        return none_result(completion, sample) or RewardResult(0.0, answer.reason)
    if not truth:
        return RewardResult(0.0, "no true box")
    pairs = match(predicted, truth, _scaled_giou if kind == "giou" else iou)
    gains = [overlap for _, _, overlap in pairs]
    if threshold is not None:
        gains = [float(overlap >= threshold) for overlap in gains]
    total = sum(gains) / max(len(truth), len(predicted))
    if not any(iou(predicted[i], truth[j]) > 0 for i, j, _ in pairs):
        return RewardResult(total, "no overlap")
    if not total:
        return RewardResult(0.0, "below threshold")
    if len(predicted) != len(truth):
        return RewardResult(total, "extra boxes" if len(predicted) > len(truth) else "missing boxes")
    return RewardResult(total, "ok")


def none_result(completion: Completion, sample: Sample) -> RewardResult | None:
    """What an answer without boxes scores for saying that there is nothing; None where it does not say so."""
    if sample.task == "classification" or not says_none(completion.text):
        return None
    return RewardResult(0.0, "wrongly none") if sample.boxes_xyxy_px else RewardResult(1.0, "rightly none")


def check_options(threshold: float | None = None, kind: str = "iou") -> None:
    """Raise ValueError on options that cannot go together or would reward every answer."""
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"iou.threshold: expected 0 < threshold <= 1, got {threshold!r}; 0 would reward any box")
    if kind not in ("iou", "giou"):
        raise ValueError(f"iou.kind: expected 'iou' or 'giou', got {kind!r}")
    if threshold is not None and kind == "giou":
        raise ValueError(f"iou.threshold={threshold!r} goes with kind='iou' only; leave out one of the two")


def _scaled_giou(a: Box, b: Box) -> float:
    return (giou(a, b) + 1) / 2
