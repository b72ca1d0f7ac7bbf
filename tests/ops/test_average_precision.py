"""Average precision equals pycocotools, over one picture and many, with ties of scores and of overlaps."""

from __future__ import annotations

import contextlib
import io
import random

import pytest

from megavg.ops import average_precision
from megavg.ops.average_precision import IOU_THRESHOLDS, RECALLS, Detections, mean_average_precision

SQUARE, FAR = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)


def by_pycocotools(pictures: list[Detections]) -> tuple[float, float]:
    """mAP and mAP50 as COCOeval gives them, or -1."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = sorted({label for p in pictures for label in (*p.truth_labels, *p.labels)})
    ids = {name: i + 1 for i, name in enumerate(names)}
    truth = COCO()
    annotations, results = [], []
    for image_id, picture in enumerate(pictures, 1):
        for (x0, y0, x1, y1), label in zip(picture.truth, picture.truth_labels):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[label],
                                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0})
        for (x0, y0, x1, y1), label, score in zip(picture.predicted, picture.labels, picture.scores):
            results.append({"image_id": image_id, "category_id": ids[label], "score": score,
                            "bbox": [x0, y0, x1 - x0, y1 - y0]})
    truth.dataset = {"images": [{"id": i + 1} for i in range(len(pictures))], "annotations": annotations,
                     "categories": [{"id": i, "name": name} for name, i in ids.items()]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results) if results else COCO(), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0], evaluation.stats[1]


def random_picture(rng: random.Random, classes: str, scores: list[float], shift: float) -> Detections:
    """Boxes on a coarse grid, so that overlaps tie too; half of the predictions are near a true box."""

    def box():
        x, y = rng.randrange(8) * 5, rng.randrange(8) * 5
        return float(x), float(y), float(x + rng.randint(1, 6) * 5), float(y + rng.randint(1, 6) * 5)

    truth = [box() for _ in range(rng.randint(0, 6))]
    truth_labels = [rng.choice(classes) for _ in truth]
    predicted, labels = [], []
    for _ in range(rng.randint(0, 9)):
        near = rng.randrange(len(truth)) if truth and rng.random() < 0.6 else None
        moved = truth[near] if near is not None else box()
        predicted.append(tuple(value + rng.uniform(0, shift) * (i > 1) for i, value in enumerate(moved)))
        labels.append(truth_labels[near] if near is not None and rng.random() < 0.8 else rng.choice(classes))
    return Detections(truth, truth_labels, predicted, labels, [rng.choice(scores) for _ in predicted])


@pytest.mark.parametrize("num_pictures, classes, scores, shift", [
    (1, "a", [0.5], 0.0),
    (1, "ab", [0.5, 0.9], 3.0),
    (1, "abc", [i / 100 for i in range(100)], 2.0),
    (5, "ab", [0.5], 1.0),
    (8, "abc", [0.1, 0.5, 0.9], 3.0),
])
def test_equals_pycocotools(num_pictures, classes, scores, shift):
    pytest.importorskip("pycocotools")
    rng = random.Random(repr((num_pictures, classes, shift)))
    seen = set()
    for _ in range(100):
        pictures = [random_picture(rng, classes, scores, shift) for _ in range(num_pictures)]
        expected = by_pycocotools(pictures) if any(p.predicted for p in pictures) else \
            ((0.0, 0.0) if any(p.truth for p in pictures) else (-1, -1))
        for thresholds, value in zip((IOU_THRESHOLDS, (0.5,)), expected):
            ours = mean_average_precision(pictures, thresholds)
            assert (-1 if ours is None else ours) == pytest.approx(value, abs=1e-6)
            seen.add(value)
    assert len(seen) > 10  # not all of them 0 or 1


def test_thresholds_are_those_of_coco_to_the_last_bit():
    numpy = pytest.importorskip("numpy")
    assert list(IOU_THRESHOLDS) == numpy.linspace(0.5, 0.95, 10).tolist()
    assert list(RECALLS) == numpy.linspace(0.0, 1.0, 101).tolist()


def test_only_the_best_hundred_of_a_picture_count():
    pytest.importorskip("pycocotools")
    assert average_precision.MAX_DETECTIONS == 100
    for place in (99, 100):  # the one that is right is the last that counts, or the first that does not
        predicted = [FAR] * 120
        predicted[place] = SQUARE
        picture = Detections([SQUARE], "a", predicted, "a" * 120, [1.0] * 120)
        expected = 1 / 100 if place == 99 else 0.0
        assert mean_average_precision([picture]) == pytest.approx(expected, abs=1e-6)
        assert by_pycocotools([picture])[0] == pytest.approx(expected, abs=1e-6)


def test_known_values():
    def value(predicted, labels, **options):
        return mean_average_precision([Detections([SQUARE, FAR], ["a", "b"], predicted, labels)], **options)

    assert value([SQUARE, FAR], "ab") == pytest.approx(1)
    assert value([SQUARE, FAR], "ba") == 0
    assert value([SQUARE], "a") == pytest.approx(0.5)
    assert value([FAR, SQUARE], "aa") == pytest.approx(0.25)
    assert value([], "") == 0
    # A class that is only predicted: COCO leaves it out.
    assert value([SQUARE, FAR, FAR], "abc") == pytest.approx(1)
    assert value([SQUARE, FAR, FAR], "abc", punish_other_classes=True) == pytest.approx(2 / 3)
    assert mean_average_precision([Detections([], [], [SQUARE], "a")]) is None
    assert mean_average_precision([Detections([], [], [SQUARE], "a")], punish_other_classes=True) == 0


def test_lists_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="Detections.labels: expected one for each of 1 boxes, got 2"):
        Detections([], [], [SQUARE], "ab")
    with pytest.raises(ValueError, match="Detections.scores"):
        Detections([], [], [SQUARE, FAR], "ab", [0.5])
