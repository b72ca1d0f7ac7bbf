"""Drawn scenes: tight boxes, expressions that name one object, and the same picture for the same seed."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.data.sample import check_sample
from megavg.data.scenes import COLOURS, GAP, SHAPES, draw_scene, scenes


def tight_box(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def answering(expression: str, objects: list[dict]) -> list[int]:
    """Which objects an expression names, worked out from its words alone."""
    *words, colour, shape = expression.split()[1:]
    kinds = ("rectangle", "square") if shape == "rectangle" else (shape,)
    found = [i for i, o in enumerate(objects) if o["colour"] == colour and o["shape"] in kinds]
    if not words:
        return found
    box = {i: objects[i]["box_xyxy_px"] for i in found}
    measure = {"largest": lambda b: (b[2] - b[0]) * (b[3] - b[1]), "smallest": lambda b: -(b[2] - b[0]) * (b[3] - b[1]),
               "leftmost": lambda b: -b[0] - b[2], "rightmost": lambda b: b[0] + b[2],
               "topmost": lambda b: -b[1] - b[3], "bottommost": lambda b: b[1] + b[3]}[words[0]]
    best = max(measure(b) for b in box.values())
    return [i for i, b in box.items() if measure(b) == best]


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**9), size=st.sampled_from([48, 96, (160, 64), (90, 130)]), most=st.integers(1, 5))
def test_boxes_are_tight_and_the_expression_names_one_object(seed, size, most):
    sample = draw_scene(random.Random(seed), size, 1, most)
    check_sample(sample)
    pixels, objects = np.asarray(sample.image), sample.meta["objects"]
    assert 1 <= len(objects) == sample.meta["num_objects"] <= most
    background = np.ones(pixels.shape[:2], bool)
    for colour, value in COLOURS.items():
        of_colour = (pixels == value).all(-1)
        background &= ~of_colour
        left = of_colour.copy()
        for box in (o["box_xyxy_px"] for o in objects if o["colour"] == colour):
            part = np.zeros_like(of_colour)
            part[box[1]:box[3], box[0]:box[2]] = of_colour[box[1]:box[3], box[0]:box[2]]
            assert tight_box(part) == box
            left &= ~part
        assert not left.any()  # every coloured pixel belongs to one object's box
    assert len(np.unique(pixels[background], axis=0)) == 1 and pixels[background].min() >= 200
    target = sample.meta["target"]
    assert answering(sample.expression, objects) == [target]
    assert sample.boxes_xyxy_px == (tuple(objects[target]["box_xyxy_px"]),)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_objects_keep_their_distance(seed):
    boxes = [o["box_xyxy_px"] for o in draw_scene(random.Random(seed), 96, 3, 5).meta["objects"]]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) >= GAP


def test_default_sides_of_a_single_object():
    longer = []
    for sample in scenes(300, seed=4, size=96):
        x0, y0, x1, y1 = sample.boxes_xyxy_px[0]
        longer.append(max(x1 - x0, y1 - y0))
    assert 22 <= min(longer) <= 27 and 44 <= max(longer) <= 48


def test_same_seed_same_scene_whatever_the_count():
    few, many = list(scenes(3, seed=9, max_objects=5)), list(scenes(6, seed=9, max_objects=5))
    for a, b in zip(few, many):
        assert a.image.tobytes() == b.image.tobytes() and (a.key, a.expression, a.meta) == (b.key, b.expression, b.meta)
    pictures = {sample.image.tobytes() for sample in many} | {s.image.tobytes() for s in scenes(6, seed=10)}
    assert len(pictures) == 12 and len({sample.key for sample in many}) == 6


def test_variety():
    drawn = [o for sample in scenes(200, seed=1, min_objects=2, max_objects=5) for o in sample.meta["objects"]]
    assert {o["shape"] for o in drawn} == set(SHAPES) and {o["colour"] for o in drawn} == set(COLOURS)
    first = {sample.expression.split()[1] for sample in scenes(600, seed=2, min_objects=5, max_objects=5)}
    assert {"largest", "smallest", "leftmost", "rightmost", "topmost", "bottommost"} <= first


@pytest.mark.parametrize("options, words", [
    ({"min_objects": 0}, "min_objects=0"), ({"min_objects": 3, "max_objects": 2}, "max_objects=2"),
    ({"size": 16}, "at least 32"), ({"min_side": 0.6, "max_side": 0.5}, "max_side"), ({"max_side": 1.5}, "max_side"),
    ({"min_objects": 5, "min_side": 0.6, "max_side": 0.8}, "do not fit"),
])
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        draw_scene(random.Random(0), **options)
