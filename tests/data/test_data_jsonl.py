"""The JSONL reader, on files written here and on the project's own screenshots."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from megavg.data.readers.jsonl import read_jsonl
from megavg.data.sample import SampleError, check_sample
from megavg.data.shards import iterate_all
from megavg.data.writer import write_shards

SCREENS = Path(__file__).parents[2] / "examples" / "data" / "webdocs_gui" / "annotations.jsonl"


@pytest.fixture
def folder(tmp_path):
    """Factory of a folder with one picture of 30 x 20 and the given lines; dicts change a line that is right."""
    def build(*lines) -> str:
        os.makedirs(tmp_path / "images", exist_ok=True)
        Image.new("P", (30, 20)).save(tmp_path / "images" / "a.b é.png")
        row = {"image": "images/a.b é.png", "width": 30, "height": 20, "split": "train", "source": "here",
               "objects": [{"label": "x", "bbox": [1, 2, 3, 4], "expression": "one"}]}
        text = [line if isinstance(line, str) else json.dumps({**row, **line}) for line in lines]
        (tmp_path / "a.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")
        return str(tmp_path / "a.jsonl")
    return build


def test_one_sample_per_expression_and_one_picture_per_line(folder):
    things = [{"label": "x", "name": "n", "bbox": [1, 2, 3, 4.5], "expressions": ["one", "two"]},
              {"label": "nameless", "bbox": [0, 0, 30, 20]},
              {"bbox": [0, 0, 30, 20], "expression": "all"}]
    samples = list(read_jsonl(folder({"objects": things}, "", {"split": "test"})))
    assert [s.expression for s in samples] == ["one", "two", "all", "one"]
    assert [s.boxes_xyxy_px for s in samples[1:3]] == [((1.0, 2.0, 3.0, 4.5),), ((0.0, 0.0, 30.0, 20.0),)]
    assert samples[0].image is samples[2].image and samples[0].image.mode == "RGB"
    assert samples[0].meta == {"label": "x", "name": "n", "source": "here", "split": "train",
                               "image": "images/a.b é.png"}
    assert len({s.key for s in samples}) == 4
    for sample in samples:
        check_sample(sample)


def test_split(folder):
    path = folder({}, {"split": "test"}, {"split": "test"})
    assert len(list(read_jsonl(path, "test"))) == 2 and len(list(read_jsonl(path))) == 3
    with pytest.raises(ValueError, match=r"no line has split 'val'.*'test', 'train'"):
        list(read_jsonl(path, "val"))


@pytest.mark.parametrize("line, reason, words", [
    ("{oops", "bad json", "line 2"), ("[]", "bad json", "line 2"), ({"image": None}, "missing field", "'image'"),
    ({"objects": "none"}, "missing field", "'objects'"), ({"width": 31}, "size mismatch", "31 x 20"),
    ({"image": "images/gone.png"}, "missing image", "gone.png"),
    ({"objects": [{"expression": "x"}]}, "missing field", "line 2 object 0"),
    ({"objects": [{"expression": "x", "bbox": [1, 2, 31, 4]}]}, "box outside image", "line 2 object 0"),
    ({"objects": [{"expressions": "x", "bbox": [1, 2, 3, 4]}]}, "bad json", "expressions"),
])
def test_wrong_lines_are_named(folder, line, reason, words):
    path = folder({}, line)
    with pytest.raises(SampleError) as caught:
        list(read_jsonl(path))
    assert caught.value.reason == reason and words in str(caught.value) and path in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="cannot read annotations.*none.jsonl"):
        list(read_jsonl(str(tmp_path / "none.jsonl")))


def test_the_screenshots_go_to_shards_and_back(tmp_path):
    rows = [json.loads(line) for line in SCREENS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 75 and sum(len(row["objects"]) for row in rows) == 1243
    small = min((row for row in rows if row["split"] == "test"), key=lambda row: row["width"] * row["height"])
    wanted = [s for s in read_jsonl(str(SCREENS), "test") if s.meta["image"] == small["image"]]
    assert [list(s.boxes_xyxy_px[0]) for s in wanted] == [o["bbox"] for o in small["objects"]]
    write_shards(wanted, str(tmp_path), "screens", 100)
    for old, new in zip(wanted, iterate_all(str(tmp_path)), strict=True):
        assert new.image.tobytes() == old.image.tobytes() and new.boxes_xyxy_px == old.boxes_xyxy_px
        assert new.meta == old.meta and new.expression == old.expression
