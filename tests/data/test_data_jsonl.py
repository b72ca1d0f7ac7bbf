"""The JSONL reader, on files written here and on the project's own screenshots and cards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from megavg.data.readers.jsonl import read
from megavg.data.sample import SampleError, check_sample
from megavg.data.shards import iterate_all
from megavg.data.writer import write_shards

SCREENS = Path(__file__).parents[2] / "examples" / "data" / "webdocs_gui" / "annotations.jsonl"
CARDS = Path(__file__).parents[3] / "shared" / "data" / "playing_cards" / "annotations.jsonl"


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


def load(path: str, *arguments, **options) -> list:
    return [draft.load() for draft in read(path, *arguments, **options)]


def test_one_sample_per_expression(folder):
    things = [{"label": "x", "name": "n", "bbox": [1, 2, 3, 4.5], "expressions": ["one", "two"]},
              {"label": "nameless", "bbox": [0, 0, 30, 20]},
              {"bbox": [0, 0, 30, 20], "expression": "all"}]
    samples = load(folder({"objects": things, "clutter": True}, "", {"split": "test"}))
    assert [s.expression for s in samples] == ["one", "two", "all", "one"]
    assert [s.boxes_xyxy_px for s in samples[1:3]] == [((1.0, 2.0, 3.0, 4.5),), ((0.0, 0.0, 30.0, 20.0),)]
    assert samples[0].image.mode == "RGB" and samples[0].task == "rec"
    assert samples[0].meta == {"label": "x", "name": "n", "source": "here", "split": "train", "clutter": True,
                               "image": "images/a.b é.png"}
    assert [s.key for s in samples[:3]] == ["a_b__-000001-000-0", "a_b__-000001-000-1", "a_b__-000001-002-0"]
    for sample in samples:
        check_sample(sample)
    assert {s.task for s in load(folder({}), task="point")} == {"point"}


CARD_ROW = {"objects": [{"label": "king", "bbox": [1, 2, 3, 4]}, {"label": "ace", "bbox": [0, 0, 30, 20], "face": "up"},
                        {"label": "ace", "bbox": [5, 5, 9, 9]}]}


def test_labels_that_occur_once_are_expressions_where_asked(folder):
    path = folder(CARD_ROW, {"objects": CARD_ROW["objects"][1:2]},
                  {"objects": [{**CARD_ROW["objects"][0], "expression": "the left one"}, CARD_ROW["objects"][1]]})
    samples = load(path, expression="label")
    assert [s.expression for s in samples] == ["the king", "the ace", "the left one", "the ace"]
    assert samples[1].meta["label"] == "ace" and samples[1].meta["face"] == "up" and len({s.key for s in samples}) == 4
    assert [s.expression for s in load(path)] == ["the left one"]
    assert [s.expression for s in load(path, expression="label", classes=["king"])] == ["the king", "the left one"]


def test_detection_and_classification(folder):
    path = folder(CARD_ROW, {"objects": [], "split": "test"}, {"objects": CARD_ROW["objects"][1:], "split": "test"})
    samples = load(path, task="detection", keep_empty=True)
    assert [s.labels for s in samples] == [("king", "ace", "ace"), (), ("ace", "ace")]
    assert {s.expression for s in samples} == {"ace, king"} and samples[0].task == "detection"
    assert samples[0].meta["objects"] == [{}, {"face": "up"}, {}] and samples[0].boxes_xyxy_px[2] == (5, 5, 9, 9)
    # a split asks for the classes of all
    assert [s.expression for s in load(path, "test", task="detection")] == ["ace, king"]
    assert [s.labels for s in load(path, task="detection", classes=["king"])] == [("king",)]
    assert [(s.labels, s.boxes_xyxy_px) for s in load(path, task="classification")] == [(("ace",), ())]
    with pytest.raises(ValueError, match="has no class 'queen'; it has ace, king"):
        load(path, task="detection", classes=["queen"])


def test_split(folder):
    path = folder({}, {"split": "test"}, {"split": "test"})
    assert len(load(path, "test")) == 2 and len(load(path)) == 3
    with pytest.raises(ValueError, match=r"no line has split 'val'.*'test', 'train'"):
        load(path, "val")


@pytest.mark.parametrize("line, reason, words", [
    ("{oops", "bad json", "line 2"), ("[]", "bad json", "line 2"), ({"image": None}, "missing field", "'image'"),
    ({"objects": "none"}, "missing field", "'objects'"), ({"width": 31}, "size mismatch", "31 x 20"),
    ({"image": "images/gone.png"}, "missing image", "gone.png"),
    ({"objects": [{"expression": "x"}]}, "missing field", "line 2 object 0"),
    ({"objects": [{"expression": "x", "bbox": [1, 2, 31, 4]}]}, "box outside image", "line 2 object 0"),
    ({"objects": [{"expressions": "x", "bbox": [1, 2, 3, 4]}]}, "bad json", "expressions"),
    ({"objects": [{"expression": "x", "label": 3, "bbox": [1, 2, 3, 4]}]}, "bad labels", "line 2 object 0"),
])
def test_wrong_lines_are_named_and_spoil_no_others(folder, line, reason, words):
    path = folder({}, line, {})
    drafts = list(read(path))
    assert drafts[0].load().expression == drafts[2].load().expression == "one" and len(drafts) == 3
    with pytest.raises(SampleError) as caught:
        drafts[1].load()
    assert caught.value.reason == reason and words in str(caught.value) and path in str(caught.value)


def test_a_bad_object_spoils_its_picture_where_all_objects_are_the_answer(folder):
    path = folder({"objects": [*CARD_ROW["objects"], {"bbox": [1, 2, 3, 4]}]}, CARD_ROW)
    broken, whole = read(path, task="detection")
    with pytest.raises(SampleError, match="line 1 object 3: .*bad labels"):
        broken.load()
    assert whole.load().labels == ("king", "ace", "ace")


@pytest.mark.parametrize("options, words", [
    ({"annotations": "none.jsonl"}, "cannot read annotations.*none.jsonl"),
    ({"image_root": "gone"}, "image_root='gone'"),
    ({"task": "rex"}, "task='rex' is none of"), ({"expression": "name"}, "expression='name' is none of given, label"),
])
def test_what_is_told_at_once(folder, options, words):
    with pytest.raises(ValueError, match=words):
        next(read(**{"annotations": folder({}), **options}))


def test_the_screenshots_go_to_shards_and_back(tmp_path):
    rows = [json.loads(line) for line in SCREENS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 75 and sum(len(row["objects"]) for row in rows) == len(list(read(str(SCREENS)))) == 1243
    small = min((row for row in rows if row["split"] == "test"), key=lambda row: row["width"] * row["height"])
    wanted = [draft.load() for draft in read(str(SCREENS), "test") if draft.fields["image"] == small["image"]]
    assert [list(s.boxes_xyxy_px[0]) for s in wanted] == [o["bbox"] for o in small["objects"]]
    write_shards(wanted, str(tmp_path), "screens", 100)
    for old, new in zip(wanted, iterate_all(str(tmp_path)), strict=True):
        assert new.image.tobytes() == old.image.tobytes() and new.boxes_xyxy_px == old.boxes_xyxy_px
        assert new.meta == old.meta and new.expression == old.expression


def test_the_playing_cards():
    if not CARDS.is_file():
        pytest.skip("playing_cards is not beside the repository")
    rows = [json.loads(line) for line in CARDS.read_text(encoding="utf-8").splitlines()]
    found = list(read(str(CARDS), task="detection"))
    assert [(d.fields["labels"], d.fields["boxes_xyxy_px"]) for d in found] == [
        ([o["label"] for o in row["objects"]], [o["bbox"] for o in row["objects"]]) for row in rows]
    assert {d.fields["expression"] for d in found} == {"ace, jack, king, nine, queen, ten"}
    once = [(row["image"], o["label"]) for row in rows for o in row["objects"]
            if sum(other["label"] == o["label"] for other in row["objects"]) == 1]
    assert [(d.fields["image"], d.fields["label"]) for d in read(str(CARDS), expression="label")] == once
    assert len(once) > 400 and [d.load().expression for d in list(read(str(CARDS), "test", expression="label"))[:3]]
