"""Label noise: replace the true boxes and classes of a known share of the samples by wrong ones, and say so in each.

How much noise a sample gets depends on its name alone, so it is the same in every epoch, on every rank and in every
layout. Noise is off by default, and evaluation never has any.

===============  ================================================================================================
task             what a noisy sample has wrong
===============  ================================================================================================
rec, point       every box
detection        every box, and its class where there are two or more to choose from; without any object it has
                 nothing to get wrong and stays clean
classification   the class: one wrong name takes the place of the right ones
===============  ================================================================================================
"""

from __future__ import annotations

import dataclasses
import os
from typing import Iterator, Sequence

from megavg.data.sample import SampleError
from megavg.ops.chance import uniforms
from megavg.protocols.options import LabelNoise
from megavg.protocols.sample import Box, Sample

NO_ROOM = "no room for noise"
_SHRINK = 0.9
_SMALLEST_PX = 1.0
_MARGIN_PX = 1e-6  # keeps rounding from making a wrong box touch a true one


def add_noise(sample: Sample, options: LabelNoise) -> Sample:
    """Give ``sample`` wrong labels with ``options.probability``, or return it with ``meta["noisy"]`` False.

    The module's table says what is wrong in which task. A wrong box has the size of the true one and is drawn evenly
    from all places inside the image where it overlaps no true box; where there is no such place, width and height
    shrink together until there is one. The wrong boxes may overlap each other. A wrong class is one of
    ``options.classes``, or without these of the names that the expression of a detection or classification lists, and
    none of the sample's own. ``meta["clean_boxes_xyxy_px"]`` and ``meta["clean_labels"]`` keep what is true. Where
    ``options.classes`` are given and ``meta["label"]`` is a text, it becomes another class, too, and
    ``meta["clean_label"]`` keeps it; the expression changes with it only where it is that very label.

    A sample that already says ``noisy`` keeps its labels: what is true of it is not known. The noisy samples of a lower
    probability are among those of a higher one. With probability 0 the sample is returned untouched.

    Source: label noise as in arXiv 2511.07738 [reported]; how it falls on the tasks is [ours].

    Raises:
        SampleError: "no room for noise", when not even a box of one pixel fits beside the true ones, or when a
            classification has no other class to take.
    """
    if not options.probability:
        return sample
    if sample.meta.get("noisy"):
        return dataclasses.replace(sample, meta={**sample.meta, "noisy": True})
    stream = f"label noise/{options.seed}/{os.path.basename(sample.shard)}/{sample.key}"
    chance = iter(uniforms(stream, 2 + 3 * len(sample.boxes_xyxy_px)).tolist())
    nothing = sample.task == "detection" and not sample.boxes_xyxy_px
    if next(chance) >= options.probability or nothing:
        return dataclasses.replace(sample, meta={**sample.meta, "noisy": False})
    meta = {**sample.meta, "noisy": True}
    expression, label, which = sample.expression, sample.meta.get("label"), next(chance)
    if sample.task != "classification":
        meta["clean_boxes_xyxy_px"] = [list(box) for box in sample.boxes_xyxy_px]
    if options.classes and isinstance(label, str):
        meta |= {"label": _pick(options.classes, (label,), which), "clean_label": label}
        expression = meta["label"] if expression == label else expression
    labels = _wrong_labels(sample, options, f"{stream}/labels")
    if labels != sample.labels:
        meta["clean_labels"] = list(sample.labels)
    boxes = tuple(_wrong_box(box, sample, chance) for box in sample.boxes_xyxy_px)
    return dataclasses.replace(sample, expression=expression, boxes_xyxy_px=boxes, labels=labels, meta=meta)


def _wrong_labels(sample: Sample, options: LabelNoise, stream: str) -> tuple[str, ...]:
    """The labels of a noisy sample: one wrong name for a classification, another class for each box of a detection."""
    classes = options.classes or tuple(name.strip() for name in sample.expression.split(",") if name.strip())
    if sample.task == "classification":
        wrong = _pick(classes, sample.labels, uniforms(stream, 1).item())
        if wrong is None:
            raise SampleError(sample.shard, sample.key, NO_ROOM, f"there is no class beside {list(sample.labels)} to "
                              f"take; give data.noise.classes, or an expression that lists the classes, got "
                              f"{sample.expression!r}")
        return (wrong,)
    chances = uniforms(stream, len(sample.labels)).tolist() if sample.labels else []
    return tuple(_pick(classes, (label,), chance) or label for label, chance in zip(sample.labels, chances))


def _pick(classes: Sequence[str], right: Sequence[str], chance: float) -> str | None:
    """One of ``classes`` that is none of ``right``; ``chance`` in [0, 1) says which. None where there is none."""
    names = {name.strip().lower() for name in right}
    others = [name for name in classes if name.strip().lower() not in names]
    return others[int(chance * len(others))] if others else None


def _wrong_box(box: Box, sample: Sample, chance: Iterator[float]) -> Box:
    """A box of the size of ``box``, or smaller, that overlaps no true box of ``sample``."""
    width, height = box[2] - box[0], box[3] - box[1]
    while not (places := _free_places(width, height, sample.boxes_xyxy_px, sample.width, sample.height)):
        width, height = width * _SHRINK, height * _SHRINK
        if min(width, height) < _SMALLEST_PX:
            raise SampleError(sample.shard, sample.key, NO_ROOM,
                              f"no box like {box!r} fits into the {sample.width} x {sample.height} image beside the "
                              "true ones, not even one of a pixel")
    # a side of length 0 is that of an image which the box fills in this direction: it must not make the area 0
    areas = [((right - left) or 1.0) * ((low - high) or 1.0) for left, right, high, low in places]
    left_over = next(chance) * sum(areas)
    for (left, right, high, low), area in zip(places, areas):
        left_over -= area
        if left_over < 0:
            break
    x, y = left + next(chance) * (right - left), high + next(chance) * (low - high)
    return x, y, min(x + width, float(sample.width)), min(y + height, float(sample.height))


def _free_places(width: float, height: float, truth: Sequence[Box], image_width: int,
                 image_height: int) -> list[tuple[float, float, float, float]]:
    """Rectangles (x from, x to, y from, y to) of all upper left corners at which a box overlaps none of ``truth``."""
    right, bottom = image_width - width, image_height - height
    blocked = [(x0 - width - _MARGIN_PX, x1 + _MARGIN_PX, y0 - height - _MARGIN_PX, y1 + _MARGIN_PX)
               for x0, y0, x1, y1 in truth]
    edges = sorted({0.0, right, *(edge for b in blocked for edge in b[:2] if 0 < edge < right)})
    places = []
    for left, to in zip(edges, edges[1:]) if right > 0 else [(0.0, 0.0)]:
        middle, free_from = (left + to) / 2, 0.0
        for _, _, high, low in sorted((b for b in blocked if b[0] < middle < b[1]), key=lambda b: b[2]):
            if min(high, bottom) > free_from:
                places.append((left, to, free_from, min(high, bottom)))
            free_from = max(free_from, low)
        if free_from < bottom or free_from == bottom == 0:
            places.append((left, to, free_from, bottom))
    return places
