"""Measure grounding answers: Acc@0.5, mean IoU and the share that parses, with the reward's own parser and frame."""

from __future__ import annotations

import math
from collections import Counter
from typing import Iterable, Sequence

from megavg.ops.boxes import center, contains, iou, match
from megavg.ops.box_text import parse_boxes
from megavg.protocols.sample import Box, Completion, Sample
from megavg.rewards.base import check_frame


def grounding_iou(predicted: Sequence[Box], truth: Sequence[Box]) -> float:
    """Overlap of one answer with the truth, 0..1; both in the same frame.

    With one true box only the FIRST predicted box counts, as in RefCOCO evaluation: answering many boxes must not
    help. With several true boxes it is the reward's measure, the sum of matched IoUs over max(true, predicted).
    """
    if not predicted or not truth:
        return 0.0
    if len(truth) == 1:
        return iou(predicted[0], truth[0])
    return sum(overlap for _, _, overlap in match(predicted, truth)) / max(len(truth), len(predicted))


class GroundingScores:
    """Collect answers row by row, on any number of ranks, and sum them up once.

    Rows are plain dictionaries of JSON values: gather ``rows`` of every rank, :meth:`extend` one collector with them,
    and call :meth:`result`. A key that comes twice (a sampler padding its last batch) is counted once.
    """

    def __init__(self, rows: Iterable[dict] = ()):
        self._rows: dict[tuple[str, str], dict] = {}
        self.extend(rows)

    @property
    def rows(self) -> list[dict]:
        """The rows so far, one per key, in the order they came."""
        return list(self._rows.values())

    def add(self, sample: Sample, completion: Completion) -> dict:
        """Score one answer and keep its row.

        Returns:
            The row: key, expression, text, predicted_boxes_px and true_boxes_px (lists of four numbers), iou (0..1),
            parsed, center_in_box (the first predicted box's centre lies in a true box, edges included), and reason:
            "ok" (IoU > 0.5), "low overlap", "no overlap" or the parser's.

        Raises:
            ValueError: the completion's frame was made for an image of another size.
        """
        check_frame(completion, sample)
        answer = parse_boxes(completion.text, completion.frame, completion.box_format)
        predicted, truth = answer.boxes_px, sample.boxes_xyxy_px
        overlap = grounding_iou(predicted, truth)
        reason = answer.reason
        if predicted:
            reason = "ok" if overlap > 0.5 else "low overlap" if overlap > 0 else "no overlap"
        row = {
            "key": sample.key,
            "shard": sample.shard,
            "expression": sample.expression,
            "text": completion.text,
            "predicted_boxes_px": [list(box) for box in predicted],
            "true_boxes_px": [list(box) for box in truth],
            "iou": overlap,
            "parsed": bool(predicted),
            "center_in_box": bool(predicted) and any(contains(box, center(predicted[0])) for box in truth),
            "reason": reason,
        }
        self.extend([row])
        return row

    def extend(self, rows: Iterable[dict]) -> None:
        """Take over rows of another collector or rank; of rows with the same shard and key the first stays."""
        for row in rows:
            self._rows.setdefault((row["shard"], row["key"]), row)

    def result(self) -> dict:
        """Sum up all rows; fractions are 0..1 of all samples, an answer that does not parse being wrong everywhere.

        Returns:
            num_samples, acc_at_50 (IoU > 0.5), acc_at_50_inclusive (IoU >= 0.5), mean_iou, parse_rate, center_in_box,
            and reasons, the number of rows by reason, most frequent first.

        Raises:
            ValueError: no row was added.
        """
        rows = self.rows
        if not rows:
            raise ValueError("no sample was scored: expected at least one; check that the evaluation shards exist and "
                             "that the rows of all ranks were gathered")
        overlaps = [row["iou"] for row in rows]
        return {
            "num_samples": len(rows),
            "acc_at_50": sum(overlap > 0.5 for overlap in overlaps) / len(rows),
            "acc_at_50_inclusive": sum(overlap >= 0.5 for overlap in overlaps) / len(rows),
            "mean_iou": math.fsum(overlaps) / len(rows),
            "parse_rate": sum(row["parsed"] for row in rows) / len(rows),
            "center_in_box": sum(row["center_in_box"] for row in rows) / len(rows),
            "reasons": dict(Counter(row["reason"] for row in rows).most_common()),
        }
