"""Show what a model gets most wrong: the answers that are furthest off, drawn, with what it said and why not."""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

from megavg.evaluation.draw import draw_boxes, panel
from megavg.evaluation.figures import headline_text
from megavg.protocols.sample import Sample

_COLUMNS = 4
_CAPTION_LINES = 6


def worst_rows(rows: Sequence[dict], count: int) -> list[dict]:
    """The ``count`` answers that are furthest off, worst first; right ones come in only where fewer are wrong.

    Wrong ones with the lowest IoU come first; of those with none, first what could not be read, then points by their
    distance to the true box. Equal ones keep the order of the set.
    """
    def badness(row: dict) -> tuple:
        miss = row.get("miss_px")
        return row["correct"], row["iou"], row["parsed"], -(math.inf if miss is None else miss)

    return sorted(rows, key=badness)[:count]


def answer_tile(sample: Sample, row: dict):
    """One answer drawn on its picture; large pictures get larger tiles."""
    scale = 224 if max(sample.width, sample.height) <= 320 else 400
    return _tile(sample.image, row, row["expression"], scale, 3)


def worst_panel(rows: Sequence[dict], pictures: Mapping[tuple[str, str], Any], name: str, result: dict):
    """One picture of the answers ``rows`` with what was asked and said; None where no picture of theirs is there."""
    tiles = []
    for row in rows:
        picture = pictures.get((row["shard"], row["key"]))
        if picture is not None:
            said = " ".join(row["text"].split()) or "(nothing)"
            tiles.append(_tile(picture, row, f"{row['expression']}\n{row['reason']}: {said}", 400, _CAPTION_LINES))
    return panel(tiles, _COLUMNS, f"{name}: the worst of {result['num_samples']} answers ({headline_text(result)})") \
        if tiles else None


def _tile(picture: Any, row: dict, caption: str, scale: int, max_lines: int):
    return draw_boxes(picture, row["true_boxes_px"], row["predicted_boxes_px"], caption, scale,
                      row.get("predicted_points_px", ()), _verdict(row), max_lines)


def _verdict(row: dict) -> str:
    """The line in bold; "" leaves it to the boxes."""
    if row["task"] == "classification":
        return f"{'right' if row['correct'] else 'wrong'}, it is: {' or '.join(row['true_labels'])}"
    if row["task"] == "detection":
        return f"{len(row['predicted_boxes_px'])} boxes for {len(row['true_boxes_px'])}, IoU {row['iou']:.2f}"
    if row["task"] == "point":
        return "no point" if row["miss_px"] is None else "hit" if row["correct"] else f"{row['miss_px']:.0f} px off"
    if len(row["true_boxes_px"]) > 1 and row["parsed"]:  # the boxes alone do not say in which order they count
        return f"{len(row['predicted_boxes_px'])} boxes for {len(row['true_boxes_px'])}, IoU {row['iou']:.2f}"
    return ""
