"""Mean average precision and recall of detection answers over a whole set, as COCO computes them (pycocotools).

Two things differ from COCO's own evaluation of its files, as the shards do not hold them:

- Crowds (iscrowd) are not there: megavg's reader of COCO leaves them out, so a box answered on a crowd is a false one,
  where COCO would ignore it. With the reader's ``keep_crowd`` they are ordinary objects.
- The area that makes an object small, medium or large is that of its box; COCO takes the area of its mask, which is
  smaller, so some objects fall into the next larger class here.
"""

from __future__ import annotations

import contextlib
import io
from typing import Sequence

_STATS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100")
"""What the first nine of COCOeval's twelve figures are called here."""


def coco_figures(rows: Sequence[dict]) -> dict:
    """COCOeval's figures for the rows of one set, 0..1, or None where the set has no such object.

    Categories are the labels of the true boxes; as in COCO, answered labels that no picture of the set holds have no
    precision and are left out of the mean, and the 100 best boxes of each picture and class count.

    Models of this kind state no confidence. Where an answer gives a score for every box, those are used; else the
    boxes of an answer rank in its order: the n-th gets 1 / n. Pictures with equal scores rank in the order of ``rows``.
    That order matters a little for the curve, and a detector that ranks its boxes by confidence has an advantage that
    such a model has not; so figures of the two kinds are not on one scale.

    Args:
        rows: of :func:`megavg.evaluation.rows.answer_row` with task "detection".

    Returns:
        map (IoU .50:.05:.95), map_50, map_75, map_small, map_medium, map_large (boxes below 32 x 32, below 96 x 96 and
        above, in original pixels), mar_1, mar_10, mar_100 (recall with so many boxes a picture and class), num_objects,
        num_categories, and unlabelled_boxes (answered without a class that could be read, and therefore not counted).
    """
    names = sorted({name for row in rows for name in row["true_labels"]})
    boxes = sum(row["predicted_labels"].count(None) + row["predicted_labels"].count("") for row in rows)
    counts = {"num_objects": sum(len(row["true_boxes_px"]) for row in rows), "num_categories": len(names),
              "unlabelled_boxes": boxes}
    if not names:
        return {**dict.fromkeys(_STATS), **counts}
    stats = _evaluate(*_coco_tables(rows, names))
    return {**{name: float(value) if value >= 0 else None for name, value in zip(_STATS, stats)}, **counts}


def ranking(scores: Sequence[float | None], num_boxes: int) -> list[float]:
    """The score of each box of one answer: as stated where every box has one, else 1 / n for the n-th box."""
    if len(scores) == num_boxes and all(score is not None for score in scores):
        return [float(score) for score in scores]
    return [1.0 / n for n in range(1, num_boxes + 1)]


def _coco_tables(rows: Sequence[dict], names: Sequence[str]) -> tuple[dict, dict]:
    """The truth and the answers as the content of COCO files."""
    number = {name: i for i, name in enumerate(names, 1)}
    common = {"images": [{"id": i, "width": row["width"], "height": row["height"]} for i, row in enumerate(rows, 1)],
              "categories": [{"id": i, "name": name} for name, i in number.items()]}
    truth, answers = [], []
    for image, row in enumerate(rows, 1):
        truth += [_annotation(len(truth) + i, image, number[label], box)
                  for i, (box, label) in enumerate(zip(row["true_boxes_px"], row["true_labels"]), 1)]
        ranked = zip(row["predicted_boxes_px"], row["predicted_labels"],
                     ranking(row["predicted_scores"], len(row["predicted_boxes_px"])))
        known = [(box, label, score) for box, label, score in ranked if label in number]
        answers += [{**_annotation(len(answers) + i, image, number[label], box), "score": score}
                    for i, (box, label, score) in enumerate(known, 1)]
    return {**common, "annotations": truth}, {**common, "annotations": answers}


def _annotation(number: int, image: int, category: int, box: Sequence[float]) -> dict:
    width, height = box[2] - box[0], box[3] - box[1]
    return {"id": number, "image_id": image, "category_id": category, "bbox": [box[0], box[1], width, height],
            "area": width * height, "iscrowd": 0}


def _evaluate(truth: dict, answers: dict) -> Sequence[float]:
    """COCOeval's twelve figures; -1 stands for "no such object"."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells its progress to the console
        loaded = []
        for content in (truth, answers):
            table = COCO()
            table.dataset = content  # loadRes refuses a set for which nothing was answered
            table.createIndex()
            loaded.append(table)
        evaluation = COCOeval(*loaded, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats
