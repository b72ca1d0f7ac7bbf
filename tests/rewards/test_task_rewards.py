"""The values of point_in_box, detection and classification."""

from __future__ import annotations

import contextlib
import io
import json
import random
import statistics

import pytest

from megavg.ops.box_text import FRAME_KIND
from megavg.protocols.sample import Completion, Frame, RewardResult, Sample
from megavg.rewards.base import load_rewards, score

JSON = "json_resized_px"
BOX, OTHER = (100.0, 50.0, 300.0, 150.0), (400.0, 200.0, 500.0, 300.0)


def make_sample(task: str, boxes=(BOX,), labels=()) -> Sample:
    return Sample("k0", "", None, 640, 480, "it", tuple(boxes), {}, task, tuple(labels))


def judged(name: str, text: str, sample: Sample, **options) -> RewardResult:
    """One reward on a text in original pixels: the picture is not resized."""
    completion = Completion(text, JSON, Frame(FRAME_KIND[JSON], 640, 480, 640, 480))
    _, results = score(completion, sample, load_rewards([{"name": name, **options}]))
    return results[name]


def point(text: str, *boxes, **options) -> RewardResult:
    return judged("point_in_box", text, make_sample("point", boxes or (BOX,)), **options)


@pytest.mark.parametrize("text, score, reason", [
    ('{"point_2d": [200, 100]}', 1, "ok"),
    ('{"point_2d": [100, 150]}', 1, "ok"),  # a corner of the box
    ('{"point_2d": [99.9, 100]}', 0, "outside"),
    ('{"bbox_2d": [0, 0, 400, 200]}', 1, "ok"),  # its centre
    ('{"bbox_2d": [90, 40, 100, 50]}', 0, "outside"),
    ("click(200, 100)", 1, "ok"),
    ("[[200, 100], [0, 0], [1, 1], [2, 2]]", 0.25, "partly outside"),
    ("[-5, 100]", 0, "outside"),
    ('{"bbox_2d": [200, 100, 200, 100]}', 0, "degenerate box"),
    ("200, 100", 0, "no point"),
])
def test_a_point_in_the_box(text, score, reason):
    assert point(text) == RewardResult(score, reason)


def test_any_of_several_boxes_will_do():
    assert point("[450, 250]", BOX, OTHER) == RewardResult(1.0, "ok")
    assert point("[350, 175]", BOX, OTHER) == RewardResult(0.0, "outside")


def test_the_terms_of_gui_g1():
    weights = {"iou_weight": 0.25, "size_weight": 0.125}
    exact = json.dumps({"bbox_2d": list(BOX)})
    assert point(exact, **weights).score == pytest.approx(1)
    assert point("[200, 100]", **weights).score == pytest.approx(1 / 1.375)
    half = '{"bbox_2d": [100, 50, 200, 150]}'  # IoU 0.5, its right edge 100 of 640 pixels off
    size = statistics.harmonic_mean([1, 1, 1 - 100 / 640, 1])
    assert point(half, **weights).score == pytest.approx((1 + 0.25 * 0.5 + 0.125 * size) / 1.375)
    assert point(half, iou_weight=0.25).score == pytest.approx(1.125 / 1.25)
    # A box that is a whole picture away has neither.
    assert point('{"bbox_2d": [1000, 1000, 9000, 9000]}', **weights) == RewardResult(0.0, "outside")


def detected(*objects, sample=None, **options) -> RewardResult:
    """Objects are (box, label) or (box, label, score)."""
    keys = ("bbox_2d", "label", "score")
    text = json.dumps([{k: v for k, v in zip(keys, each) if v is not None} for each in objects])
    return judged("detection", text, sample or make_sample("detection", (BOX, OTHER), ("king", "queen")), **options)


def test_detection_by_label_order_and_score():
    assert detected((BOX, "king"), (OTHER, "queen")) == RewardResult(1.0, "ok")
    assert detected((BOX, " King."), (OTHER, "'QUEEN'")).score == pytest.approx(1)
    assert detected((BOX, "king")) == RewardResult(pytest.approx(0.5), "some right")
    assert detected((BOX, "queen"), (OTHER, "king")) == RewardResult(0.0, "no box right")
    assert detected((BOX, "queen"), (OTHER, "king"), match_labels=False).score == pytest.approx(1)
    assert detected((BOX, None), (OTHER, None)) == RewardResult(0.0, "no label")
    assert detected((BOX, "king"), (OTHER, "queen"), (BOX, "jack"), length_penalty=False).score == pytest.approx(2 / 3)
    one = make_sample("detection", (BOX,), ("king",))
    assert by_rank((OTHER, "king"), (BOX, "king"), sample=one).score == pytest.approx(0.5)
    assert by_rank((OTHER, "king", 0.1), (BOX, "king", 0.9), sample=one).score == pytest.approx(1)
    assert by_rank((OTHER, "king", 0.1), (BOX, "king", None), sample=one).score == pytest.approx(0.5)


def by_rank(*objects, sample) -> RewardResult:
    """Average precision alone, in which a wrong box after the right ones costs nothing."""
    return detected(*objects, sample=sample, length_penalty=False)


def test_a_label_that_is_no_name_matches_nothing():
    true_label, other_label = "x" * 201, "y" * 201
    one = make_sample("detection", (BOX,), (true_label,))
    assert detected((BOX, other_label), (BOX, "king"), sample=one) == RewardResult(0.0, "no box right")
    assert detected((BOX, true_label), (BOX, None), (BOX, "king"), sample=one).score == 0


@pytest.mark.parametrize("text", ['[{"bbox_2d": [100, 50, 300, 150], "label": "king"}, {"bbox_2d": [1, 1, 3,',
                                  '[{"bbox_2d": [100, 50, 300, 150], "label": "king"}, {"bbox_2d": null}]'])
@pytest.mark.parametrize("name", ["iou", "giou", "detection", "point_in_box"])
def test_a_right_box_before_a_malformed_one_earns_nothing(name, text):
    result = judged(name, text, make_sample("detection", (BOX,), ("king",)))
    assert result == RewardResult(0.0, "not two numbers" if name == "point_in_box" else "not four numbers")


def test_detection_thresholds_and_length():
    one = make_sample("detection", (BOX,), ("king",))
    near = (100.0, 50.0, 300.0, 120.0)  # IoU 0.7
    assert detected((near, "king"), sample=one).score == pytest.approx(0.5)
    assert detected((near, "king"), sample=one, mode="map50").score == pytest.approx(1)
    many = [(BOX, "king"), *[(OTHER, "king")] * 3]
    # Average precision forgives what comes after; the reward's default does not.
    assert detected(*many, sample=one, length_penalty=False) == RewardResult(1.0, "extra boxes")
    assert detected(*many, sample=one) == RewardResult(0.25, "extra boxes")
    filled = [(BOX, "king"), *[(OTHER, "king")] * 50]
    assert detected(*filled, sample=one) == RewardResult(pytest.approx(1 / 51), "extra boxes")
    assert detected((BOX, "king")).score == pytest.approx(0.5)  # fewer than true: no penalty


def test_detection_without_labels_in_the_truth_looks_at_boxes_only():
    sample = make_sample("rec", (BOX, OTHER))
    assert detected((BOX, "x"), (OTHER, None), sample=sample).score == pytest.approx(1)


def test_detection_equals_pycocotools_on_one_picture():
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = random.Random(3)

    def box():
        x, y = rng.randrange(0, 300, 10), rng.randrange(0, 300, 10)
        return [x, y, x + rng.randrange(10, 200, 10), y + rng.randrange(10, 150, 10)]

    values = set()
    for _ in range(60):
        truth = [(box(), rng.choice("ab")) for _ in range(rng.randint(1, 5))]
        classes = sorted({label for _, label in truth})
        answers = [(rng.choice(truth)[0] if rng.random() < 0.6 else box(), rng.choice(classes), rng.random())
                   for _ in range(rng.randint(1, 6))]
        coco = COCO()
        coco.dataset = {"images": [{"id": 1}], "categories": [{"id": ord(label)} for label in classes],
                        "annotations": [{"id": i + 1, "image_id": 1, "category_id": ord(label), "iscrowd": 0,
                                         "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
                                        for i, ((x0, y0, x1, y1), label) in enumerate(truth)]}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
            found = coco.loadRes([{"image_id": 1, "category_id": ord(label), "score": confidence,
                                   "bbox": [x0, y0, x1 - x0, y1 - y0]}
                                  for (x0, y0, x1, y1), label, confidence in answers])
            evaluation = COCOeval(coco, found, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        sample = make_sample("detection", [tuple(map(float, each)) for each, _ in truth], [label for _, label in truth])
        for mode, expected in (("map", evaluation.stats[0]), ("map50", evaluation.stats[1])):
            found_map = detected(*answers, sample=sample, mode=mode, length_penalty=False).score
            assert found_map == pytest.approx(expected, abs=1e-6)
            values.add(round(float(expected), 6))
    assert len(values) > 12


@pytest.mark.parametrize("text, score, reason", [
    ("king", 1, "ok"),
    (" The King. ", 0, "wrong class"),
    ("'KING'.", 1, "ok"),
    ('{"label": "monarch"}', 1, "ok"),
    ("kin", 0, "wrong class"),
    ("king or queen", 0, "wrong class"),
    ("king queen jack", 0, "wrong class"),
    ("k", 0, "wrong class"),
    ("", 0, "no class"),
    ("''", 0, "no class"),
    ("<think>king", 0, "no class"),
    ("<answer></answer>king", 0, "no class"),
    ('[{"label": "king"}, {"label": "queen"}]', 0, "no class"),
])
def test_classification_takes_the_whole_name_and_nothing_else(text, score, reason):
    assert judged("classification", text, make_sample("classification", (), ("king", "Monarch"))) == \
        RewardResult(score, reason)


def test_classification_without_a_true_class_scores_nothing():
    for labels in ((), ("",), (" . ",)):
        for text in ("king", "", "."):
            assert judged("classification", text, make_sample("classification", (), labels)).score == 0
