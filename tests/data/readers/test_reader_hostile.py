"""Rows and names that would end a build, lose a box, repeat a key or read a file that is none of the data set's."""

from __future__ import annotations

import json
import os
import time

import pytest

from megavg.data.builder.build import build_shards
from megavg.data.builder.options import BuildOptions
from megavg.data.readers import coco, conversations, jsonl, voc
from megavg.data.readers.answers import boxes_of
from megavg.data.readers.base import ImageFile, PictureFolder, key_from
from megavg.data.sample import SampleError
from megavg.data.shards import iterate_all


def line(**changes) -> dict:
    return {"image": "a.png", "width": 40, "height": 30, "objects": [{"bbox": [1, 2, 3, 4], "expression": "x"}],
            **changes}


def jsonl_file(tmp_path, *rows) -> str:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "a.jsonl")


def annotation(name: str, width="40") -> str:
    return (f"<annotation><filename>{name}.png</filename><size><width>{width}</width><height>30</height></size><object>"
            "<name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
            "</annotation>")


def voc_folder(tmp_path, picture, names, **options) -> str:
    (tmp_path / "Annotations").mkdir()
    for name in names:
        picture(f"JPEGImages/{name}.png")
        (tmp_path / "Annotations" / f"{name}.xml").write_text(annotation(name, **options))
    return str(tmp_path)


@pytest.mark.parametrize("names", [
    ["img1_jpg.rf.aa11", "img1_jpg.rf.bb22"], ["a" * 59 + "1", "a" * 59 + "2"], ["图", "画"], ["a-b", "a_b", "_a_b"],
    ["a.jpg", "a.png", "a"]])
@pytest.mark.parametrize("task", ["detection", "rec"])
def test_names_that_a_key_cannot_hold_stay_apart(tmp_path, picture, names, task):
    root = voc_folder(tmp_path, picture, names)
    build_shards(voc.read(root, task=task), str(tmp_path / "out"), BuildOptions())
    samples = list(iterate_all(str(tmp_path / "out")))
    assert sorted(sample.meta["image"] for sample in samples) == sorted(name + ".png" for name in names)


def test_a_name_that_fits_is_the_key():
    assert key_from("there/screenspot_web.json", 9, 0) == "screenspot_web-9-0"
    assert len({key_from("a" * 35, "b" * 35, "c" * 35 + end, 1) for end in "xyz"}) == 3
    assert key_from("voc", "2008_000001") == "voc-2008_000001"
    assert key_from("a.b", 1) != key_from("a.c", 1) and key_from("a.b", 1) == key_from("there/a.b", 1)


def test_coco_ids_that_are_texts_stay_apart(tmp_path, picture):
    picture("a.png")
    ids = ["a/1", "b/1", "a.b", "a.c", "x" * 60 + "1", "x" * 60 + "2", "/" * 99, 7]
    (tmp_path / "i.json").write_text(json.dumps({
        "images": [{"id": name, "file_name": "a.png", "width": 40, "height": 30} for name in ids],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": n, "image_id": name, "category_id": 1, "bbox": [1, 2, 3, 4]}
                        for n, name in enumerate(ids)]}))
    keys = [draft.key for draft in coco.read(str(tmp_path / "i.json"), str(tmp_path))]
    assert len(set(keys)) == len(ids) and keys[-1] == "a-7"


@pytest.mark.parametrize("bad, reason", [
    ({"image": "a\0.png"}, "missing image"), ({"image": "\ud800.png"}, "bad json"),
    ({"image": "a" * 5000}, "missing image"), ({"width": 10**400}, "bad json"),
    ({"objects": [{"bbox": [10**400, 2, 3, 4], "expression": "x"}]}, "bad json"),
    ({"objects": [{"bbox": [0, 0, 10**308, 10**308], "expression": "x"}]}, "box outside image"),
])
def test_bad_rows_are_left_out_and_named(tmp_path, picture, bad, reason):
    picture("a.png")
    path = jsonl_file(tmp_path, line(), line(**bad))
    index = build_shards(jsonl.read(path), str(tmp_path / "out"), BuildOptions(on_error="skip"))
    assert index["num_samples"] == 1 and index["left_out"][reason]["count"] == 1
    (row,) = [json.loads(row) for row in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert "a.jsonl: line 2" in row["where"] and row["key"]


def test_an_object_may_have_any_field_of_its_own(tmp_path, picture):
    picture("a.png")
    thing = {"bbox": [1, 2, 3, 4], "label": "cat", "picture": 1, "key_parts": 2, "clip_px": 3}
    (draft,) = jsonl.read(jsonl_file(tmp_path, line(objects=[thing])), expression="label")
    assert draft.load().meta["clip_px"] == 3 and draft.load().expression == "the cat"


@pytest.mark.parametrize("width", ["inf", "-inf", "nan", "1e400"])
def test_a_width_that_is_no_number_is_a_bad_file(tmp_path, picture, width):
    (draft,) = voc.read(voc_folder(tmp_path, picture, ["a"], width=width))
    with pytest.raises(SampleError, match="a.xml.*width is no number of pixels"):
        draft.load()


@pytest.mark.parametrize("row, words", [
    ({"normal_caption": 5}, "'normal_caption' must be a text, got 5"),
    ({"width": 10**400, "height": 30}, "is no picture's"), ({"solution": [0, 0, 10**308, 10**308]}, "box outside"),
    ({"image": "a\0.png"}, "missing image")])
@pytest.mark.parametrize("frame", ["pixels", "relative_1000"])
def test_bad_conversations_are_bad_rows(tmp_path, picture, row, words, frame):
    picture("a.png")
    row = {"image": "a.png", "problem": "Please provide the bounding box coordinate of the region this sentence "
           "describes: cat", "solution": [1, 2, 30, 29], **row}
    (draft,) = conversations.read(jsonl_file(tmp_path, row), frame)
    with pytest.raises(SampleError) as caught:
        draft.load()
    assert words in str(caught.value) and "a.jsonl: line 1" in str(caught.value)


def test_faults_of_another_split_are_not_told(tmp_path, picture):
    picture("a.png")
    path = jsonl_file(tmp_path, line(split="train"), {"split": "test", "image": 5}, [1])
    assert [draft.problem is None for draft in jsonl.read(path, "train")] == [True, False]  # [1] may be of any split
    assert [draft.problem is None for draft in jsonl.read(path, "test")] == [False, False]


def test_only_regular_files_are_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/null", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            ImageFile(str(path)).read()


def test_names_do_not_leave_the_folder_of_the_pictures(tmp_path, picture):
    outside, inside = picture("secret.png"), picture("in/a.png")
    with open(inside, "rb") as file:
        data = file.read()
    folder = PictureFolder(str(tmp_path / "in"))
    for name in ("a.png", "./a.png", "../in/a.png", inside, "b/../a.png"):
        (tmp_path / "in" / "b").mkdir(exist_ok=True)
        assert folder.file(name).read() == data
    for name in ("../secret.png", outside, "b/../../secret.png", "../in2/a.png"):
        with pytest.raises(OSError, match="outside the folder of the pictures.*--allow-outside"):
            folder.file(name).read()
    assert PictureFolder(str(tmp_path / "in"), True).file("../secret.png").read()
    path = jsonl_file(tmp_path / "in", line(image="../secret.png"))
    with pytest.raises(SampleError, match="missing image: .*secret.png: the annotations name a file outside"):
        next(jsonl.read(path)).load()
    assert next(jsonl.read(path, allow_outside=True)).load().image.size == (40, 30)
    assert next(jsonl.read(path, image_root=str(tmp_path))).load  # the name is taken from there


@pytest.mark.parametrize("answer, wanted", [
    ("<think>[1, 2, 3, 4]</think> the box is [5,6,7,8]", [[5, 6, 7, 8]]),
    ("<answer>[1,2,3,4]</answer> no: <answer>[5,6,7,8]</answer> <answer>", [[5, 6, 7, 8]]),
    ("at [1e1, 2, 3.5E1, 40]", [[10, 2, 35, 40]]), ("(1,2),(3,4) and [5,6,7,8]", [[1, 2, 3, 4], [5, 6, 7, 8]]),
    ("[.5, .1, .7, .9] or [1,2,3,4]", None), ("[1,2,3,4] and [5,6,7]", None), ("[1,2,3,4], [1.2.3, 4]", None),
    ("figure (2), (the cat) at [1,2,3,4]", [[1, 2, 3, 4]]), ("```\n[1,2,3,4]\n```", [[1, 2, 3, 4]]),
    ("```json[1,2,3,4]```", [[1, 2, 3, 4]]), ("```none```", [])])
def test_no_box_of_an_answer_is_lost_in_silence(answer, wanted):
    found = boxes_of(answer)
    assert (found and [box for box, _ in found]) == wanted


@pytest.mark.parametrize("answer", ["<answer>" * 20000, "```" + " " * 100000, "```" + "a" * 100000, "[" * 100000 + "x",
                                    "[" + "1" * 100000, "(1," * 50000, "</think>" * 20000])
def test_long_answers_are_read_in_no_time(answer):
    start = time.process_time()
    boxes_of(answer)
    assert time.process_time() - start < 0.5
