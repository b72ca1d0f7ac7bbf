"""Label noise: replace the true boxes of a known share of the samples by wrong ones, and say so in each sample.

How much noise a sample gets depends on its name alone, so it is the same in every epoch, on every rank and in every
layout. Noise is off by default, and evaluation never has any.
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

    Noisy means: every true box is replaced by one of the same size, drawn evenly from all places inside the image where
    it overlaps no true box; where there is no such place, width and height shrink together until there is one. The
    wrong boxes may overlap each other. ``meta["clean_boxes_xyxy_px"]`` keeps the true ones. Where ``options.classes``
    are given and ``meta["label"]`` is a text, it becomes another class and ``meta["clean_label"]`` keeps it; the
    expression changes with it only where it is that very label.

    A sample that already says ``noisy`` keeps its boxes: what is true of it is not known. The noisy samples of a lower
    probability are among those of a higher one. With probability 0 the sample is returned untouched.

    Source: label noise as in arXiv 2511.07738 [reported].

    Raises:
        SampleError: "no room for noise", when not even a box of one pixel fits beside the true ones.
    """
    if not options.probability:
        return sample
    if sample.meta.get("noisy"):
        return dataclasses.replace(sample, meta={**sample.meta, "noisy": True})
    stream = f"label noise/{options.seed}/{os.path.basename(sample.shard)}/{sample.key}"
    chance = iter(uniforms(stream, 2 + 3 * len(sample.boxes_xyxy_px)).tolist())
    if next(chance) >= options.probability:
        return dataclasses.replace(sample, meta={**sample.meta, "noisy": False})
    meta = {**sample.meta, "noisy": True, "clean_boxes_xyxy_px": [list(box) for box in sample.boxes_xyxy_px]}
    expression, label, which = sample.expression, sample.meta.get("label"), next(chance)
    if options.classes and isinstance(label, str):
        others = [name for name in options.classes if name != label]
        meta |= {"label": others[int(which * len(others))], "clean_label": label}
        expression = meta["label"] if expression == label else expression
    boxes = tuple(_wrong_box(box, sample, chance) for box in sample.boxes_xyxy_px)
    return dataclasses.replace(sample, expression=expression, boxes_xyxy_px=boxes, meta=meta)


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
