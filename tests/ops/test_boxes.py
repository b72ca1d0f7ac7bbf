"""Box geometry: known values, an independent pixel count, and values that must never score."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from megavg.ops import boxes

BAD = [
    (5, 5, 5, 9), (5, 5, 4, 9), (0, 0, 0, 0), (math.nan, 0, 5, 5), (0, 0, math.inf, 5), (-math.inf, 0, 5, math.inf),
]


def random_box(rng: random.Random, size: int = 12) -> tuple[int, int, int, int]:
    x0, y0 = rng.randrange(size), rng.randrange(size)
    return x0, y0, rng.randint(x0 + 1, size), rng.randint(y0 + 1, size)


def pixels(box) -> set[tuple[int, int]]:
    return set(itertools.product(range(box[0], box[2]), range(box[1], box[3])))


def test_iou_and_giou_equal_a_count_of_pixels():
    rng = random.Random(0)
    for _ in range(500):
        a, b = random_box(rng), random_box(rng)
        inside, union = len(pixels(a) & pixels(b)), len(pixels(a) | pixels(b))
        hull = len(pixels((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))))
        assert boxes.iou(a, b) == boxes.iou(b, a) == pytest.approx(inside / union, abs=1e-12)
        assert boxes.giou(a, b) == pytest.approx(inside / union - (hull - union) / hull, abs=1e-12)
        assert boxes.area(a) == len(pixels(a))


@pytest.mark.parametrize("bad", BAD)
def test_boxes_without_area_never_score(bad):
    good = (0, 0, 10, 10)
    assert boxes.iou(bad, good) == boxes.iou(good, bad) == boxes.iou(bad, bad) == 0
    assert boxes.giou(bad, good) == boxes.giou(bad, bad) == -1
    assert boxes.area(bad) == 0
    assert boxes.match([bad], [good]) == boxes.match([good], [bad]) == []
    assert not boxes.is_valid(bad, 100, 100)
    assert not boxes.contains(bad, (5, 5))


def test_boxes_at_the_limits_of_floats_do_not_score():
    huge, tiny = (-1e308, -1e308, 1e308, 1e308), (0, 0, 1e-200, 1e-200)
    for a, b in itertools.product((huge, tiny, (0, 0, 1, 1)), repeat=2):
        assert 0 <= boxes.iou(a, b) <= 1
        assert -1 <= boxes.giou(a, b) <= 1
    assert boxes.iou(huge, huge) == 0


def test_is_valid_takes_the_edges_of_the_image_and_nothing_beyond():
    assert boxes.is_valid((0, 0, 20, 10), 20, 10)
    for box in [(-1, 0, 5, 5), (0, -0.1, 5, 5), (0, 0, 20.1, 5), (0, 0, 5, 11)]:
        assert not boxes.is_valid(box, 20, 10)


def test_clip_keeps_the_inside_and_empties_what_lies_outside():
    assert boxes.clip((-5, 2, 50, 60), 20, 10) == (0, 2, 20, 10)
    assert boxes.area(boxes.clip((30, 2, 50, 6), 20, 10)) == 0


def test_center_and_contains():
    assert boxes.center((2, 4, 6, 10)) == (4, 7)
    assert boxes.contains((2, 4, 6, 10), (2, 10))
    assert not boxes.contains((2, 4, 6, 10), (1.9, 5))


def test_match_is_one_to_one_and_each_box_takes_the_best_that_is_free():
    truth = [(0, 0, 10, 10), (20, 0, 30, 10)]
    assert boxes.match([(20, 0, 30, 10), (0, 0, 10, 5)], truth) == [(0, 1, 1.0), (1, 0, 0.5)]
    # The second copy of a box finds its true box taken and overlaps nothing else.
    assert boxes.match([(0, 0, 10, 10)] * 3, truth) == [(0, 0, 1.0)]
    # Order is confidence: the first box keeps the true box that the second would fit better.
    assert boxes.match([(0, 0, 10, 5), (0, 0, 10, 10)], truth) == [(0, 0, 0.5)]


def test_match_takes_another_score():
    near_then_far = [(12, 0, 18, 10), (80, 0, 90, 10)]
    pairs = boxes.match([(0, 0, 10, 10)], near_then_far, score=lambda a, b: (boxes.giou(a, b) + 1) / 2)
    assert [(i, j) for i, j, _ in pairs] == [(0, 0)]


def test_by_confidence_ranks_only_where_every_box_states_one():
    assert boxes.by_confidence([0.1, 0.9, 0.9, 0.5]) == [1, 2, 3, 0]
    assert boxes.by_confidence([0.1, None, 0.9]) == [0, 1, 2]
    assert boxes.by_confidence([]) == []


def test_iou_equals_pycocotools():
    mask = pytest.importorskip("pycocotools.mask")
    import numpy

    rng = random.Random(1)
    for trial in range(200):
        number = (lambda: rng.uniform(0, 400)) if trial % 2 else (lambda: float(rng.randrange(20)))
        sides = [[(number(), number(), number() + 0.5, number() + 0.5) for _ in range(rng.randint(1, 8))]
                 for _ in range(2)]
        theirs = mask.iou(*(numpy.array(xywh) for xywh in sides), [0] * len(sides[1]))
        for i, a in enumerate(sides[0]):
            for j, b in enumerate(sides[1]):
                ours = boxes.iou(*((x, y, x + w, y + h) for x, y, w, h in (a, b)))
                assert ours == pytest.approx(theirs[i, j], abs=1e-9)
