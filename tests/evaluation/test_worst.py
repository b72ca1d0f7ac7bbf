"""The worst answers: in the right order, drawn with what was said, and a report that holds every figure."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from megavg.evaluation.draw import PREDICTED_COLOR, draw_boxes
from megavg.evaluation.figures import figures
from megavg.evaluation.report import write_results, write_set
from megavg.evaluation.rows import answer_row
from megavg.evaluation.worst import answer_tile, worst_panel, worst_rows
from megavg.protocols.sample import RELATIVE_1000, RESIZED_PX, Completion, Frame, Sample

BOX = (0.0, 0.0, 100.0, 100.0)
ABOUT = {"model": "runs/x/hf", "family": "qwen3_vl", "dtype": "float32", "layout": "TP1 x PP1 x DP1",
         "max_new_tokens": 32, "prompts": {"rec": "Find {expression}."}, "versions": {"megavg": "0"}}


def make(key: str, text: str, task: str = "rec", labels: tuple[str, ...] = ()) -> tuple[Sample, dict]:
    boxes = () if task == "classification" else (BOX,)
    sample = Sample(key, "a.tar", Image.new("RGB", (200, 150), "grey"), 200, 150, "the thing", boxes, {}, task, labels)
    frame = Frame(RELATIVE_1000, 200, 150, 224, 168)
    return sample, answer_row(sample, Completion(text, "json_relative_1000", frame))


def test_the_order_of_boxes():
    answers = {"right": "[0, 0, 500, 667]", "half": "[0, 0, 250, 667]", "far": "[900, 900, 990, 990]", "mute": "?"}
    rows = [make(key, text)[1] for key, text in answers.items()]
    assert [row["key"] for row in worst_rows(rows, 3)] == ["mute", "far", "half"]
    assert len(worst_rows(rows, 9)) == 4 and worst_rows(rows, 0) == []


def test_the_order_of_points():
    answers = {"hit": "[250, 300]", "near": "[510, 300]", "far": "[990, 990]", "mute": "left"}
    rows = [make(key, f'{{"point_2d": {text}}}', "point")[1] for key, text in answers.items()]
    assert [row["key"] for row in worst_rows(rows, 4)] == ["mute", "far", "near", "hit"]


@pytest.mark.parametrize("task, text, labels", [
    ("rec", "[0, 0, 100, 100]", ()), ("rec", "", ()), ("point", '{"point_2d": [900, 900]}', ()),
    ("point", '{"point_2d": [1e5, -1e5]}', ()), ("detection", '[{"bbox_2d": [1, 1, 500, 500], "label": "cat"}]', ("cat",)),
    ("classification", "dog " * 40, ("cat",)),
])
def test_every_task_is_drawn(task, text, labels):
    sample, row = make("a", text, task, labels)
    assert answer_tile(sample, row).width == 224
    picture = worst_panel([row], {("a.tar", "a"): sample.image}, "set", figures([row]))
    assert picture.width > 400 and len(picture.getcolors(1 << 20)) > 5
    assert worst_panel([row], {}, "set", figures([row])) is None


def test_points_are_drawn_where_they_are():
    tile = draw_boxes(Image.new("RGB", (224, 224), "grey"), [], [], "", points=[(56.0, 168.0)])
    seen = [(x, y) for x in range(224) for y in range(224) if tile.getpixel((x, y)) == PREDICTED_COLOR]
    assert seen and all((x - 56) ** 2 + (y - 168) ** 2 <= 64 for x, y in seen)
    assert sum(x for x, _ in seen) / len(seen) == pytest.approx(56, abs=1)


def test_a_set_is_written_and_reported(tmp_path):
    made = [make("a", "[0, 0, 500, 667]"), make("b", "nothing")]
    rows, pictures = [row for _, row in made], {("a.tar", sample.key): sample.image for sample, _ in made}
    result = figures(rows) | {"skipped": 1, "skipped_reasons": {"broken image": 1}}
    (tmp_path / "val").mkdir()
    files = write_set(tmp_path / "val", "val", rows, result, 1, lambda names: {n: pictures[n] for n in names})
    assert files == ["rows.jsonl", "worst.jsonl", "worst.png"]
    assert [json.loads(line)["key"] for line in (tmp_path / "val" / "worst.jsonl").read_text().splitlines()] == ["b"]
    text = write_results(tmp_path, {"val": {**result, "files": files}}, {"val": rows}, ABOUT)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["sets"]["val"]["acc_at_50"] == 0.5 and content["about"] == ABOUT and "refcoco" not in content
    for part in ("# Evaluation of runs/x/hf", "| val |", " 50.0 |", "Left out as unusable: broken image 1.",
                 "Question (rec):\n\n```text\nFind {expression}.\n```", "Reasons: ok 1, no JSON 1."):
        assert part in text
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_report_keeps_every_blank_of_a_question_and_tells_what_is_in_no_split(tmp_path):
    asked = "Find {expression}.\n\n  As  in:\n```json\n{}\n```\n"
    _, row = make("a", "[0, 0, 500, 667]")
    row["meta"] = {"dataset": "refcoco", "split_by": "google", "split": "test"}
    result = {**figures([row]), "skipped": 0, "files": []}
    text = write_results(tmp_path, {"s": result}, {"s": [row]}, {**ABOUT, "prompts": {"rec": asked}})
    assert f"Question (rec):\n\n````text\n{asked}\n````\n" in text
    assert "In none of the eight official splits (UNC's of RefCOCO and RefCOCO+, UMD's of RefCOCOg): " \
           "refcoco by google test 1." in text
    assert json.loads((tmp_path / "results.json").read_text())["refcoco_left_out"] == {"refcoco by google test": 1}


def test_a_picture_says_what_its_row_says():
    """Two true boxes, ranked by confidence: the tile must not count them in another order."""
    image = Image.new("RGB", (400, 400), "grey")
    sample = Sample("a", "a.tar", image, 400, 400, "two", (BOX, (200.0, 200.0, 300.0, 300.0)))
    text = '[{"bbox_2d": [0, 0, 100, 250], "score": 0.1}, {"bbox_2d": [0, 0, 100, 100], "score": 0.9}]'
    row = answer_row(sample, Completion(text, "json_resized_px", Frame(RESIZED_PX, 400, 400, 400, 400)))
    assert row["iou"] == pytest.approx(0.5)
    plain = draw_boxes(image, row["true_boxes_px"], row["predicted_boxes_px"], "two", 400,
                       verdict="2 boxes for 2, IoU 0.50")
    assert list(answer_tile(sample, row).getdata()) == list(plain.getdata())


def test_no_worst_case_no_picture(tmp_path):
    _, row = make("a", "[0, 0, 500, 667]")
    assert write_set(tmp_path, "val", [row], figures([row]), 0, lambda names: {}) == ["rows.jsonl"]
