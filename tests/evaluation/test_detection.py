"""mAP of answers equals what pycocotools computes from COCO files that hold the same."""

from __future__ import annotations

import json
import random

import pytest

from megavg.evaluation.detection import coco_figures, ranking
from megavg.evaluation.figures import figures, headline, headline_text, in_stored_order, summary
from megavg.evaluation.rows import answer_row
from megavg.protocols.sample import RELATIVE_1000, Completion, Frame, Sample

SIZE = 1000  # pixels and units of the frame alike
FRAME = Frame(RELATIVE_1000, SIZE, SIZE, 560, 560)
FIGURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100")


def row_of(place: int, truth, answer) -> dict:
    """The row of a picture; ``answer`` is a text, or (box, label, score or None) of each answered box."""
    sample = Sample(f"s{place:03d}", "a.tar", None, SIZE, SIZE, "king, queen", tuple(box for box, _ in truth), {},
                    "detection", tuple(label for _, label in truth))
    text = answer if isinstance(answer, str) else json.dumps([
        {"bbox_2d": list(box), **({"label": label} if label else {}), **({} if score is None else {"score": score})}
        for box, label, score in answer])
    return answer_row(sample, Completion(text, "json_relative_1000", FRAME))


def pycocotools_figures(folder, pictures) -> dict:
    """COCOeval on two COCO files: instances.json, and results.json as a detector writes it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = sorted({label for truth, _ in pictures for _, label in truth})
    truths = [(i, box, label) for i, (truth, _) in enumerate(pictures) for box, label in truth]
    (folder / "instances.json").write_text(json.dumps({
        "images": [{"id": i, "width": SIZE, "height": SIZE, "file_name": f"{i}.png"} for i in range(len(pictures))],
        "categories": [{"id": 10 + i, "name": label} for i, label in enumerate(labels)],
        "annotations": [{"id": 1 + k, "image_id": i, "category_id": 10 + labels.index(label), "iscrowd": 0,
                         "area": (box[2] - box[0]) * (box[3] - box[1]),
                         "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
                        for k, (i, box, label) in enumerate(truths)]}))
    (folder / "results.json").write_text(json.dumps([
        {"image_id": i, "category_id": 10 + labels.index(label), "score": score,
         "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
        for i, (_, answer) in enumerate(pictures) for box, label, score in answer if label in labels]))
    truth = COCO(str(folder / "instances.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(folder / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {name: None if value < 0 else pytest.approx(float(value), abs=1e-12)
            for name, value in zip(FIGURES, evaluation.stats)}


def random_pictures(seed: int):
    """Pictures with and without objects, and answers that hit, miss, repeat a box, name another or an unknown class."""
    rng = random.Random(seed)

    def box(limit: int = 400):
        x, y = rng.randrange(0, 500), rng.randrange(0, 500)
        return [x, y, x + rng.randrange(8, limit), y + rng.randrange(8, limit)]

    pictures = []
    for _ in range(rng.randrange(2, 9)):
        truth = [(tuple(map(float, box())), rng.choice(["king", "queen", "ace"])) for _ in range(rng.randrange(0, 5))]
        answer = []
        for true_box, label in truth:
            if rng.random() < 0.8:
                near = [value + rng.randrange(-30, 30) for value in true_box]
                near = [max(value, 0) for value in near]
                if near[2] > near[0] and near[3] > near[1]:
                    answer += [(near, rng.choice([label, label, "king", "joker"]))] * rng.choice([1, 1, 2])
        answer += [(box(), rng.choice(["king", "queen", "joker"])) for _ in range(rng.randrange(0, 3))]
        rng.shuffle(answer)
        pictures.append((truth, [(b, label, round(rng.random(), 4)) for b, label in answer]))
    pictures.append(([((10.0, 10.0, 60.0, 60.0), "king")], [([10, 10, 60, 61], "king", 0.5)]))
    return pictures


@pytest.mark.parametrize("seed", range(20))
def test_figures_equal_pycocotools_on_coco_files(tmp_path, seed):
    pictures = random_pictures(seed)
    rows = [row_of(i, truth, answer or "None") for i, (truth, answer) in enumerate(pictures)]
    assert {name: coco_figures(rows)[name] for name in FIGURES} == pycocotools_figures(tmp_path, pictures)


@pytest.mark.parametrize("seed", range(5))
def test_without_scores_boxes_rank_in_the_order_of_the_answer(tmp_path, seed):
    pictures = random_pictures(seed)
    rows = [row_of(i, truth, [(box, label, None) for box, label, _ in answer] or "None")
            for i, (truth, answer) in enumerate(pictures)]
    ranked = [(truth, [(box, label, 1 / n) for n, (box, label, _) in enumerate(answer, 1)])
              for truth, answer in pictures]
    assert {name: coco_figures(rows)[name] for name in FIGURES} == pycocotools_figures(tmp_path, ranked)


def test_scores_count_only_where_every_box_has_one():
    assert ranking([0.2, 0.9], 2) == [0.2, 0.9]
    assert ranking([0.2, None], 2) == ranking([], 2) == [1.0, 0.5]


def test_a_set_without_an_object_has_no_precision_but_is_counted():
    rows = [row_of(0, [], "None"), row_of(1, [], [([0, 0, 9, 9], "king", None)])]
    result = figures(rows)
    assert result["map"] is None and result["num_objects"] == 0 and result["correct_rate"] == 0.5
    assert headline(result) == ("mAP", None) and headline_text(result) == "mAP undefined"
    assert summary(result).startswith("mAP undefined  ") and "  parsed " in summary(result)


def test_nothing_answered_is_no_precision_at_all():
    rows = [row_of(i, [((0.0, 0.0, 50.0, 50.0), "king")], "I cannot see any") for i in range(3)]
    result = figures(rows)
    assert (result["map"], result["map_50"], result["mar_100"], result["parse_rate"]) == (0, 0, 0, 0)


def test_a_label_is_needed_and_its_lack_is_counted():
    rows = [row_of(0, [((0.0, 0.0, 50.0, 50.0), "king")], [([0, 0, 50, 50], None, None)]),
            row_of(1, [((0.0, 0.0, 50.0, 50.0), "king")], [([0, 0, 50, 50], "KING", None)])]
    result = coco_figures(rows)
    assert result["unlabelled_boxes"] == 1 and result["mar_100"] == 0.5 and result["num_categories"] == 1


def test_ties_do_not_depend_on_which_rank_answered_what():
    """First boxes of all answers have equal scores; gathered rank by rank they would rank in another order."""
    pictures = [picture for seed in range(4) for picture in random_pictures(seed)]
    rows = [row_of(i, truth, [(box, label, None) for box, label, _ in answer] or "None")
            for i, (truth, answer) in enumerate(pictures)]
    samples = [Sample(row["key"], row["shard"], None, SIZE, SIZE, "", ()) for row in rows]
    gathered = [[row for rank in range(size) for row in rows[rank::size]] for size in (1, 2, 3, 4)]
    assert len({figures(order)["map"] for order in gathered}) > 1, "there are ties that matter"
    for order in gathered:
        assert in_stored_order(order, samples) == rows
    strange = {**rows[0], "key": "stranger"}
    assert in_stored_order([strange, *gathered[2]], samples) == [*rows, strange], "which check_complete refuses"
