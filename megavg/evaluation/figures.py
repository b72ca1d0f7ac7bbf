"""Sum up rows into the figures of a set, by task, and name the one figure that says most."""

from __future__ import annotations

import math
from collections import Counter
from typing import Iterable, Sequence

from megavg.evaluation.detection import coco_figures
from megavg.evaluation.rows import answer_row
from megavg.protocols.sample import Completion, Sample

HEADLINES = {"rec": ("acc_at_50", "Acc@0.5"), "point": ("accuracy", "point accuracy"), "detection": ("map", "mAP"),
             "classification": ("accuracy", "accuracy"), "mixed": ("correct_rate", "correct")}
"""Task -> the figure that says most, and its name in logs and tables; "mixed" stands for a set of several tasks."""


class AnswerScores:
    """Collect answers row by row, on any number of ranks, and sum them up once.

    Rows are plain dictionaries of JSON values: gather ``rows`` of every rank, :meth:`extend` one collector with them,
    and call :meth:`result`. A key that comes twice (a sampler padding its last batch) is counted once.
    """

    def __init__(self, rows: Iterable[dict] = ()):
        self._rows: dict[tuple[str, str], dict] = {}
        self.extend(rows)

    @property
    def rows(self) -> list[dict]:
        """The rows so far, one per shard and key, in the order they came."""
        return list(self._rows.values())

    def add(self, sample: Sample, completion: Completion) -> dict:
        """Score one answer, keep its row and return it; see :func:`megavg.evaluation.rows.answer_row`."""
        row = answer_row(sample, completion)
        self.extend([row])
        return row

    def extend(self, rows: Iterable[dict]) -> None:
        """Take over rows of another collector or rank; of rows with the same shard and key the first stays."""
        for row in rows:
            self._rows.setdefault((row["shard"], row["key"]), row)

    def result(self) -> dict:
        """Sum up all rows, see :func:`figures`."""
        return figures(self.rows)


def in_stored_order(rows: Sequence[dict], samples: Sequence[Sample]) -> list[dict]:
    """The rows in the order of their samples, strangers last: figures that break ties by order, as COCO's mAP does,
    must not depend on which rank answered what."""
    place = {(sample.shard, sample.key): i for i, sample in enumerate(samples)}
    return sorted(rows, key=lambda row: place.get((row["shard"], row["key"]), len(place)))


def figures(rows: Sequence[dict]) -> dict:
    """The figures of a set; fractions are 0..1 of all its samples, and an answer that cannot be read is wrong.

    Returns:
        For every task: task, num_samples, correct_rate, parse_rate, truncated_rate, and reasons, the number of rows by
        reason, most frequent first. By task:

        - rec: acc_at_50, acc_at_70, acc_at_90 (IoU above it), acc_at_50_inclusive (IoU >= 0.5), mean_iou,
          center_in_box.
        - point: accuracy, center_in_box (the same).
        - detection: map, map_50, mar_100 and the rest of :func:`megavg.evaluation.detection.coco_figures`; mean_iou.
        - classification: accuracy, and macro_accuracy, the mean over the classes.

        Rows of several tasks give task "mixed" and ``tasks``, the figures of each.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("no sample was scored: expected at least one; check that the evaluation shards exist and that "
                         "the rows of all ranks were gathered")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    common = {
        "task": tasks[0] if len(tasks) == 1 else "mixed",
        "num_samples": len(rows),
        "correct_rate": _share(rows, "correct"),
        "parse_rate": _share(rows, "parsed"),
        "truncated_rate": _share(rows, "truncated"),
    }
    if len(tasks) == 1:
        own = _BY_TASK[tasks[0]](rows)
    else:
        own = {"tasks": {task: figures([row for row in rows if row["task"] == task]) for task in tasks}}
    return {**common, **own, "reasons": dict(Counter(row["reason"] for row in rows).most_common())}


def headline(result: dict) -> tuple[str, float | None]:
    """(name, value) of the figure that says most about a result of :func:`figures`.

    None for one that is not defined, as mAP is where no picture of the set shows anything.
    """
    key, name = HEADLINES[result.get("task", "rec")]  # results of older versions are all of boxes
    return name, result[key]


def headline_text(result: dict) -> str:
    """The headline of a result for a picture: "Acc@0.5 81.2%"."""
    name, value = headline(result)
    return f"{name} undefined" if value is None else f"{name} {value:.1%}"


def summary(result: dict) -> str:
    """One line for a log: "Acc@0.5 0.812  mean IoU 0.733  parsed 1.000  (8 samples)"."""
    name, value = headline(result)
    parts = [f"{name} undefined" if value is None else f"{name} {value:.3f}"]
    for key, words in (("mean_iou", "mean IoU"), ("map_50", "mAP50"), ("parse_rate", "parsed")):
        if result.get(key) is not None:
            parts.append(f"{words} {result[key]:.3f}")
    return "  ".join([*parts, f"({result['num_samples']} samples)"])


def _share(rows: Sequence[dict], flag: str) -> float:
    return sum(row[flag] for row in rows) / len(rows)


def _mean_iou(rows: Sequence[dict]) -> float:
    return math.fsum(row["iou"] for row in rows) / len(rows)


def _rec(rows: Sequence[dict]) -> dict:
    def above(limit: float) -> float:
        return sum(row["iou"] > limit for row in rows) / len(rows)

    return {"acc_at_50": above(0.5), "acc_at_50_inclusive": sum(row["iou"] >= 0.5 for row in rows) / len(rows),
            "acc_at_70": above(0.7), "acc_at_90": above(0.9), "mean_iou": _mean_iou(rows),
            "center_in_box": _share(rows, "center_in_box")}


def _point(rows: Sequence[dict]) -> dict:
    return {"accuracy": _share(rows, "correct"), "center_in_box": _share(rows, "correct")}


def _detection(rows: Sequence[dict]) -> dict:
    return {**coco_figures(rows), "mean_iou": _mean_iou(rows)}


def _classification(rows: Sequence[dict]) -> dict:
    classes: dict[str, list[bool]] = {}
    for row in rows:
        classes.setdefault(row["true_labels"][0], []).append(row["correct"])
    shares = [sum(flags) / len(flags) for flags in classes.values()]
    return {"accuracy": _share(rows, "correct"), "macro_accuracy": math.fsum(shares) / len(shares)}


_BY_TASK = {"rec": _rec, "point": _point, "detection": _detection, "classification": _classification}
